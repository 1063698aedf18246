"""The ``dense`` engine: unpack, run PyTorch's operation on whole images, pack; SparK's way, and the oracle of tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import onednn
from ..geometry import Call, Stencil
from ..layout import dense_operand, gather_patches, scatter_patches

__all__ = [
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "how",
    "max_pool2d",
    "max_pool2d_grad",
    "why_not",
    "why_unusable",
]

Size = tuple[int, int]


def why_unusable(device: str, dtype: torch.dtype) -> str | None:
    """Return why this engine cannot run on a device and dtype: it always can."""
    return None


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take the call: it always can."""
    return None


def how(call: Call) -> str:
    """Return the method by which this engine computes a call, in a few words."""
    return "PyTorch on the zero-filled image"


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve the zero-filled image and keep the active patches."""
    image = dense_operand(scatter_patches(x, slot, coords), stencil.stride, groups)
    out = onednn.conv2d(image, weight, bias, stencil.stride, stencil.padding, stencil.dilation, groups)
    return gather_patches(out, slot, coords)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stencil: Stencil, groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    options = (stencil.stride, stencil.padding, stencil.dilation, groups)
    return onednn.conv2d_backward(grad, x, weight, *options, wanted)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the input gradient at the active patches."""
    image = scatter_patches(grad, slot, coords)
    batch, rows, columns = slot.shape
    x = image.new_empty(batch, weight.shape[1] * groups, rows * size[0], columns * size[1])
    x = x.contiguous(memory_format=torch.channels_last)
    return gather_patches(_backward(image, x, weight, stencil, groups, (True, False))[0], slot, coords)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient."""
    weight = x.new_empty(grad.shape[1], x.shape[1] // groups, *stencil.kernel)
    images = (scatter_patches(grad, slot, coords), scatter_patches(x, slot, coords))
    return _backward(*images, weight, stencil, groups, (False, True))[1]


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Pool the zero-filled image; return the maxima and the winning taps (uint8) of the active patches."""
    # PyTorch pads half a kernel at most, without its dilation.
    (up, aside), (down, beside) = stencil.padding, (max(0, after) for after in stencil.after)
    image = F.pad(scatter_patches(x, slot, coords), (aside, beside, up, down), value=-torch.inf)
    pooled, at = F.max_pool2d(image, stencil.kernel, stencil.stride, 0, stencil.dilation, return_indices=True)
    top, left = (origin + p for origin, p in zip(_stencil_origins(pooled, stencil), stencil.padding, strict=True))
    row, column = at // image.shape[3] - top, at % image.shape[3] - left
    tap = row // stencil.dilation[0] * stencil.kernel[1] + column // stencil.dilation[1]
    return gather_patches(pooled, slot, coords), gather_patches(tap.to(torch.uint8), slot, coords)


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Send the gradient of each active output to its winning tap."""
    image, taps = scatter_patches(grad, slot, coords), scatter_patches(tap, slot, coords).long()
    batch, rows, columns = slot.shape
    x = image.new_zeros(batch, image.shape[1], rows * size[0], columns * size[1])
    x = _pad_after(x, stencil)
    top, left = _stencil_origins(image, stencil)
    row = top + taps // stencil.kernel[1] * stencil.dilation[0]
    column = left + taps % stencil.kernel[1] * stencil.dilation[1]
    inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])  # else the border won
    image, at = torch.where(inside, image, 0), torch.where(inside, row * x.shape[3] + column, 0)
    x_grad = x.new_zeros(x.shape).flatten(2).scatter_add_(2, at.flatten(2), image.flatten(2)).view(x.shape)
    return gather_patches(x_grad[:, :, : rows * size[0], : columns * size[1]], slot, coords)


def _stencil_origins(pooled: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the image row ``(H, 1)`` and column ``(W,)`` of the first tap of each stencil."""
    top = torch.arange(pooled.shape[2], device=pooled.device)[:, None] * stencil.stride[0] - stencil.padding[0]
    left = torch.arange(pooled.shape[3], device=pooled.device) * stencil.stride[1] - stencil.padding[1]
    return top, left


def _pad_after(image: Tensor, stencil: Stencil) -> Tensor:
    """Extend the image where stencils of ``ceil_mode`` reach beyond the padding."""
    extra = [max(0, a - p) for a, p in zip(stencil.after, stencil.padding, strict=True)]
    return F.pad(image, (0, extra[1], 0, extra[0])) if max(extra) else image
