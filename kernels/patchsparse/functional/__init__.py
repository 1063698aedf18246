"""The front door: neighbourhood operations on packed patches, with SparK's dense-and-mask meaning.

An inactive neighbour reads as 0 and the image border as the padding; an output pixel is active if and only if its
patch is. Pointwise operations (activation, normalisation over channels) need no function of their own: PyTorch's run on
a packed tensor unchanged. So do 1x1 convolutions, which are faster as a product of matrices here.
"""

from .conv import patch_conv2d, patch_conv_transpose2d
from .norm import patch_batch_norm_act, patch_batch_norm_unpack
from .pool import patch_avg_pool2d, patch_max_pool2d

__all__ = [
    "patch_avg_pool2d",
    "patch_batch_norm_act",
    "patch_batch_norm_unpack",
    "patch_conv2d",
    "patch_conv_transpose2d",
    "patch_max_pool2d",
]
