"""Convolution of whole images by an engine of packed patches: an image is a single patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import cpp
from .functional import patch_conv2d, patch_conv_transpose2d
from .geometry import Call, Stencil
from .grid import PatchGrid, whole_grid
from .pointwise import local_conv2d

__all__ = ["image_conv2d", "image_conv_transpose2d", "image_engine", "image_grid"]

ONE = Stencil((1, 1))
THREE = Stencil((3, 3), (1, 1), (1, 1))
DOUBLE = Stencil((4, 4), (2, 2), (1, 1))


def image_engine(image: Tensor, out_channels: int, backend: str = "auto") -> bool:
    """Return whether `image_conv2d` of ``image`` ``(B, C, H, W)`` runs by the ``cpp`` engine rather than PyTorch.

    It does where that engine has Winograd's method for it, which neither ``F.conv2d`` nor another engine has:
    float32 or float64 on a CPU, even sides, 32 channels and more. ``backend`` other than ``"auto"`` and ``"cpp"``,
    autocast, ``torch.compile`` and subclasses of Tensor leave it to PyTorch.
    """
    size, channels = (image.shape[2], image.shape[3]), (image.shape[1], out_channels)
    return _by_engine(image, "conv2d", out_channels, THREE, backend) and cpp.winograd(
        image.dtype, size, channels, THREE
    )


def image_grid(image: Tensor, backend: str = "auto") -> PatchGrid | None:
    """Return the grid to bind for whole images ``(B, C, H, W)`` in a sparsified module: each is a single patch.

    None, which is the plain dense module, where `image_conv_transpose2d` would leave them to PyTorch. Equivalent to::

        grid = PatchGrid.from_active(torch.ones(B, 1, 1, dtype=torch.bool))
    """
    channels = image.shape[1]
    return whole_grid(image.shape[0]) if _by_engine(image, "conv2d", channels, ONE, backend) else None


def image_conv2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Convolve whole images, 3x3 with padding 1 or 1x1: ``F.conv2d(image, weight, bias, padding=k // 2)``, or faster.

    A 1x1 convolution is the matrix product of `local_conv2d`, where oneDNN would go through few pixels image by image.

    Args:
        image: ``(B, C_in, H, W)``, any float dtype.
        weight: ``(C_out, C_in, k, k)`` of the same dtype, k = 1 or 3.
        bias: ``(C_out,)`` or None.
        backend: ``"auto"`` or ``"cpp"`` may take the engine, see `image_engine`; any other name does not.

    Returns:
        ``(B, C_out, H, W)``; in channels_last memory if the engine computed it.
    """
    if weight.shape[2:] == (3, 3) and image_engine(image, weight.shape[0], backend):
        return patch_conv2d(image, weight, bias, whole_grid(image.shape[0]), padding=1, backend="cpp")
    if weight.shape[2:] == (1, 1) and image_grid(image, backend) is not None:
        return local_conv2d(image.contiguous(memory_format=torch.channels_last), weight, bias, ONE, 1)
    return F.conv2d(image, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def image_conv_transpose2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Enlarge whole images twofold: ``F.conv_transpose2d(image, weight, bias, 2, padding=1)``, faster where it can be.

    The ``cpp`` engine is 2.2 times as fast as oneDNN at 768 channels of 9 x 9 pixels, 1.3 times at 384 of 18 x 18
    (forward + backward, float32, batch 4, two cores of Zen 5).

    Args:
        image: ``(B, C_in, H, W)``, any float dtype.
        weight: ``(C_in, C_out, 4, 4)`` of the same dtype.
        bias: ``(C_out,)`` or None.
        backend: ``"auto"`` or ``"cpp"`` takes the engine under the conditions of `image_engine`, sides and channels
            aside; any other name does not.

    Returns:
        ``(B, C_out, 2 H, 2 W)``; in channels_last memory if the engine computed it.
    """
    if weight.shape[2:] == (4, 4) and _by_engine(image, "conv2d_dgrad", weight.shape[1], DOUBLE, backend):
        grid = whole_grid(image.shape[0])
        return patch_conv_transpose2d(image, weight, bias, grid, stride=2, padding=1, backend="cpp")
    return F.conv_transpose2d(image, weight, bias, stride=2, padding=1)


def _by_engine(image: Tensor, op: str, out_channels: int, stencil: Stencil, backend: str) -> bool:
    """Return whether whole images are a case for the ``cpp`` engine: eager, float32 or float64, on a CPU."""
    if not cpp.may_replace_pytorch(image, backend):
        return False
    size, channels = (image.shape[2], image.shape[3]), (image.shape[1], out_channels)
    call = Call(op, image.device.type, image.dtype, image.shape[0], size, *channels, stencil)
    return image.dtype in (torch.float32, torch.float64) and cpp.why_not(call) is None
