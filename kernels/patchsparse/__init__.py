"""True submanifold sparse convolution for masked image modelling, on packed patches.

See ``kernels/README.md`` for the layout and a ten-line use in a timm model.
"""

from .binding import bind
from .functional import (
    available_backends,
    explain,
    patch_avg_pool2d,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
    why_unavailable,
)
from .grid import PatchGrid
from .images import image_conv2d, image_conv_transpose2d, image_engine, image_grid
from .ops_densify import patch_batch_norm_unpack
from .ops_norm import patch_batch_norm_act
from .packing import pack, unpack
from .sparsify import UnsupportedModuleError, sparsify

__all__ = [
    "PatchGrid",
    "UnsupportedModuleError",
    "available_backends",
    "bind",
    "explain",
    "image_conv2d",
    "image_conv_transpose2d",
    "image_engine",
    "image_grid",
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
