"""Pooling in PyTorch, on tiles with halo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import Stencil
from .. import tables
from .halo import Size, halo, halo_adjoint, patch_size

__all__ = ["avg_pool2d", "avg_pool2d_grad", "max_pool2d", "max_pool2d_grad"]


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil and the winning tap (uint8, row-major in the kernel).

    An inactive neighbour counts as 0 and the image border as -inf, as pooling a zero-filled dense image does.
    Of equal values the first in row-major order wins, as in ``F.max_pool2d``.
    """
    tile = halo(x, slot, coords, stencil.before, stencil.after, outside=-torch.inf)
    pooled, at = F.max_pool2d(tile, stencil.kernel, stencil.stride, 0, stencil.dilation, return_indices=True)
    top, left = _stencil_origins(tile, pooled, stencil)
    row, column = at // tile.shape[3] - top, at % tile.shape[3] - left
    tap = row // stencil.dilation[0] * stencil.kernel[1] + column // stencil.dilation[1]
    return pooled, tap.to(torch.uint8)


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return the gradient at the input ``(N, C, ph, pw)``: each output's gradient goes to its winning tap."""
    tile_size = [s + b + a for s, b, a in zip(size, stencil.before, stencil.after, strict=True)]
    tile = grad.new_empty(grad.shape[0], grad.shape[1], *tile_size).contiguous(memory_format=torch.channels_last)
    top, left = _stencil_origins(tile, grad, stencil)
    row = top + tap.long() // stencil.kernel[1] * stencil.dilation[0]
    column = left + tap.long() % stencil.kernel[1] * stencil.dilation[1]
    at = row * tile.shape[3] + column
    tile_grad = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, tile, stencil.kernel, stencil.stride, [0, 0], stencil.dilation, False, at
    )
    return halo_adjoint(tile_grad, slot, coords, size, stencil.before, stencil.after)


def _stencil_origins(tile: Tensor, pooled: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the tile row ``(oh, 1)`` and column ``(ow,)`` of the first tap of each stencil."""
    top = torch.arange(pooled.shape[2], device=tile.device)[:, None] * stencil.stride[0]
    left = torch.arange(pooled.shape[3], device=tile.device) * stencil.stride[1]
    return top, left


def avg_pool2d(
    x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, divisor: int, count_include_pad: bool
) -> Tensor:
    """Return the sum over each stencil, by ``divisor``, or by the pixels in the image without ``count_include_pad``.

    An inactive neighbour counts as a pixel of value 0.
    """
    tile = halo(x, slot, coords, stencil.before, stencil.after)
    if count_include_pad:
        return F.avg_pool2d(tile, stencil.kernel, stencil.stride, 0, divisor_override=divisor)
    pixels = _pixels_inside(slot, coords, patch_size(x), stencil)
    return F.avg_pool2d(tile, stencil.kernel, stencil.stride, 0, divisor_override=1) / pixels.to(x.dtype)


def avg_pool2d_grad(
    grad: Tensor,
    slot: Tensor,
    coords: Tensor,
    size: Size,
    stencil: Stencil,
    divisor: int,
    count_include_pad: bool,
) -> Tensor:
    """Return the gradient at the input ``(N, C, ph, pw)``: pooling is linear, this is its adjoint."""
    if not count_include_pad:
        divisor, grad = 1, grad / _pixels_inside(slot, coords, size, stencil).to(grad.dtype)
    tile_size = [s + b + a for s, b, a in zip(size, stencil.before, stencil.after, strict=True)]
    tile = grad.new_empty(grad.shape[0], grad.shape[1], *tile_size).contiguous(memory_format=torch.channels_last)
    tile_grad = torch.ops.aten.avg_pool2d_backward(
        grad, tile, stencil.kernel, stencil.stride, [0, 0], False, True, divisor
    )
    return halo_adjoint(tile_grad, slot, coords, size, stencil.before, stencil.after)


def _pixels_inside(slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return ``(N, 1, oh, ow)``, how many pixels of each stencil lie inside the image."""
    inside = (tables.tap_rows(slot, coords, size, stencil) != tables.OUTSIDE).sum(1)
    return inside.view(-1, 1, *stencil.output_size(size))
