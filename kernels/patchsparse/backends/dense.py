"""The ``dense`` engine: unpack, run PyTorch's operation on whole images, pack; SparK's way, and the oracle of tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Call, Window
from ..layout import dense_operand, gather_patches, scatter_patches

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_wgrad", "max_pool2d", "max_pool2d_grad", "why_not"]

Size = tuple[int, int]


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take the call: never."""
    return None


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, window: Window, groups: int
) -> Tensor:
    """Convolve the zero-filled image and keep the active patches."""
    image = dense_operand(scatter_patches(x, slot, coords))
    out = F.conv2d(image, weight, bias, window.stride, window.padding, window.dilation, groups)
    return gather_patches(out, slot, coords)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, window: Window, groups: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, window.stride, window.padding, window.dilation, False, [0, 0], groups, wanted
    )


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, window: Window, groups: int
) -> Tensor:
    """Return the input gradient at the active patches."""
    image = scatter_patches(grad, slot, coords)
    batch, rows, columns = slot.shape
    x = image.new_empty(batch, weight.shape[1] * groups, rows * size[0], columns * size[1])
    x = x.contiguous(memory_format=torch.channels_last)
    return gather_patches(_backward(image, x, weight, window, groups, [True, False, False])[0], slot, coords)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, window: Window, groups: int) -> Tensor:
    """Return the weight gradient."""
    weight = x.new_empty(grad.shape[1], x.shape[1] // groups, *window.kernel)
    images = (scatter_patches(grad, slot, coords), scatter_patches(x, slot, coords))
    return _backward(*images, weight, window, groups, [False, True, False])[1]


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Pool the zero-filled image; return the maxima and the winning taps (uint8) of the active patches."""
    image = _pad_after(scatter_patches(x, slot, coords), window, -torch.inf)
    pooled, at = F.max_pool2d(image, window.kernel, window.stride, window.padding, window.dilation, return_indices=True)
    top, left = _window_origins(pooled, window)
    row, column = at // image.shape[3] - top, at % image.shape[3] - left
    tap = row // window.dilation[0] * window.kernel[1] + column // window.dilation[1]
    return gather_patches(pooled, slot, coords), gather_patches(tap.to(torch.uint8), slot, coords)


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, window: Window) -> Tensor:
    """Send the gradient of each active output to its winning tap."""
    image, taps = scatter_patches(grad, slot, coords), scatter_patches(tap, slot, coords).long()
    batch, rows, columns = slot.shape
    x = image.new_zeros(batch, image.shape[1], rows * size[0], columns * size[1])
    x = _pad_after(x, window, 0.0)
    top, left = _window_origins(image, window)
    row = top + taps // window.kernel[1] * window.dilation[0]
    column = left + taps % window.kernel[1] * window.dilation[1]
    at = (row * x.shape[3] + column).clamp_(0, x.shape[2] * x.shape[3] - 1)  # inactive outputs carry no gradient
    x_grad = x.new_zeros(x.shape).flatten(2).scatter_add_(2, at.flatten(2), image.flatten(2)).view(x.shape)
    return gather_patches(x_grad[:, :, : rows * size[0], : columns * size[1]], slot, coords)


def _window_origins(pooled: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Return the image row ``(H, 1)`` and column ``(W,)`` of the first tap of each window."""
    top = torch.arange(pooled.shape[2], device=pooled.device)[:, None] * window.stride[0] - window.padding[0]
    left = torch.arange(pooled.shape[3], device=pooled.device) * window.stride[1] - window.padding[1]
    return top, left


def _pad_after(image: Tensor, window: Window, value: float) -> Tensor:
    """Extend the image where ``ceil_mode`` windows reach beyond the padding."""
    extra = [max(0, a - p) for a, p in zip(window.after, window.padding, strict=True)]
    return F.pad(image, (0, extra[1], 0, extra[0]), value=value) if max(extra) else image
