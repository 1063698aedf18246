"""True submanifold sparse convolution for masked image modelling, on packed patches.

See ``kernels/README.md`` for the layout and a ten-line use in a timm model.
"""

from .adoption.adopt import UnsupportedModuleError
from .adoption.binding import bind, join_statistics
from .adoption.graphed import graphed
from .adoption.sparsify import sparsify
from .explanation import available_backends, explain, why_unavailable
from .functional import (
    patch_avg_pool2d,
    patch_batch_norm_act,
    patch_batch_norm_unpack,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
)
from .grid import PatchGrid
from .packing import pack, unpack
from .whole_images import image_conv2d, image_conv_transpose2d, image_engine, image_grid

__all__ = [
    "PatchGrid",
    "UnsupportedModuleError",
    "available_backends",
    "bind",
    "explain",
    "graphed",
    "image_conv2d",
    "image_conv_transpose2d",
    "image_engine",
    "image_grid",
    "join_statistics",
    "pack",
    "patch_avg_pool2d",
    "patch_batch_norm_act",
    "patch_batch_norm_unpack",
    "patch_conv2d",
    "patch_conv_transpose2d",
    "patch_max_pool2d",
    "sparsify",
    "unpack",
    "why_unavailable",
]
