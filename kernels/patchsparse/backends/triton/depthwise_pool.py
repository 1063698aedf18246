"""Depthwise convolution and max-pooling on the Triton engine: launches of ``depthwise_pool_kernels.py``."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from ...geometry import Stencil
from .configs import Tile, stencil_tile
from .conv import sum_launch
from .depthwise_pool_kernels import (
    patch_depthwise_fwd_kernel,
    patch_depthwise_wgrad_kernel,
    patch_max_pool2d_fwd_kernel,
    patch_max_pool2d_grad_kernel,
)
from .launch import Launch, as_rows, processors, row_major, rows_like
from .places import axes

__all__ = [
    "depthwise",
    "depthwise_launch",
    "depthwise_wgrad",
    "depthwise_wgrad_launches",
    "max_pool2d",
    "max_pool2d_grad",
    "pool_grad_launch",
    "pool_launch",
]

Size = tuple[int, int]


def _programs(y: Tensor, tile: Tile) -> tuple[tuple[int, ...], int]:
    """Return the grid of a kernel with one program per tile of rows and channels, and the number of rows."""
    count = y.shape[0] * y.shape[2] * y.shape[3]
    return (ceil(count / tile.m) * ceil(y.shape[1] / tile.n),), count


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    target: Size,
    stencil: Stencil,
    transposed: bool,
) -> Tensor:
    """Return a depthwise convolution with ``weight`` ``(C, 1, kh, kw)``, or its input gradient if ``transposed``."""
    y = rows_like(x, x.shape[0], target, x.shape[1])
    depthwise_launch(as_rows(x), weight, bias, y, slot, coords, stencil, transposed).run()
    return y


def depthwise_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    slot: Tensor,
    coords: Tensor,
    stencil: Stencil,
    transposed: bool,
) -> Launch:
    """Return the launch that fills ``y`` ``(N, C, ph, pw)`` from ``rows`` ``(N, ph, pw, C)``."""
    tile = stencil_tile(y.shape[1])
    grid, count = _programs(y, tile)
    by_tap = weight.flatten(1).t().contiguous()  # (taps, C): neighbouring channels are neighbours in memory
    scalars = (count, slot.shape[1], slot.shape[2], y.shape[1], by_tap.stride(0), 1)
    constants = axes((rows.shape[1], rows.shape[2]), (y.shape[2], y.shape[3]), stencil)
    return Launch(
        patch_depthwise_fwd_kernel,
        grid,
        (rows, by_tap, None if bias is None else bias.contiguous(), y, *row_major(slot, coords), *scalars),
        constants | {"TRANSPOSED": transposed, "BLOCK_M": tile.m, "BLOCK_C": tile.n},
        tile.warps,
        tile.stages,
    )


def depthwise_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> Tensor:
    """Return the gradient ``(C, 1, kh, kw)`` of a depthwise weight."""
    weight = rows_like(x, x.shape[1], stencil.kernel, 1)
    for launch in depthwise_wgrad_launches(as_rows(x), as_rows(grad), weight, slot, coords, stencil):
        launch.run()
    return weight


def depthwise_wgrad_launches(
    x: Tensor, grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil
) -> list[Launch]:
    """Return the launches that fill ``weight`` from ``x`` and ``grad``, both ``(N, ph, pw, C)``."""
    source, size, channels = (x.shape[1], x.shape[2]), (grad.shape[1], grad.shape[2]), x.shape[3]
    count = grad.shape[0] * size[0] * size[1]
    block_j = 1 << (stencil.kernel[1] - 1).bit_length()
    block_c = stencil_tile(channels).n
    block_m = max(1, 8192 // (block_j * block_c))
    programs = stencil.kernel[0] * ceil(channels / block_c)
    splits = max(1, min(ceil(processors(x.device) * 8 / programs), ceil(count / (4 * block_m))))
    parts = x.new_empty(splits, weight.numel(), dtype=torch.float32)
    partial = Launch(
        patch_depthwise_wgrad_kernel,
        (programs * splits,),
        (x, grad, parts, *row_major(slot, coords), count, slot.shape[1], slot.shape[2], channels, splits),
        axes(source, size, stencil) | {"BLOCK_J": block_j, "BLOCK_M": block_m, "BLOCK_C": block_c},
        4,
        1,
    )
    return [partial, sum_launch(parts, weight)]


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil and the winning tap (uint8)."""
    y = rows_like(x, x.shape[0], stencil.output_size((x.shape[2], x.shape[3])), x.shape[1])
    tap = torch.empty_like(y, dtype=torch.uint8)
    pool_launch(as_rows(x), y, tap, slot, coords, stencil).run()
    return y, tap


def pool_launch(rows: Tensor, y: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> Launch:
    """Return the launch that fills ``y`` and ``tap`` ``(N, C, ph, pw)`` from ``rows`` ``(N, ph, pw, C)``."""
    tile = stencil_tile(y.shape[1])
    grid, count = _programs(y, tile)
    constants = axes((rows.shape[1], rows.shape[2]), (y.shape[2], y.shape[3]), stencil)
    return Launch(
        patch_max_pool2d_fwd_kernel,
        grid,
        (rows, y, tap, *row_major(slot, coords), count, slot.shape[1], slot.shape[2], y.shape[1]),
        constants | {"BLOCK_M": tile.m, "BLOCK_C": tile.n},
        tile.warps,
        tile.stages,
    )


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return the gradient at the input ``(N, C, ph, pw)``: each input pixel collects from the stencils it won."""
    y = rows_like(grad, grad.shape[0], size, grad.shape[1])
    pool_grad_launch(as_rows(grad), as_rows(tap), y, slot, coords, stencil).run()
    return y


def pool_grad_launch(grad: Tensor, tap: Tensor, y: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> Launch:
    """Return the launch that fills ``y`` ``(N, C, ph, pw)`` from ``grad`` and ``tap`` ``(N, ph, pw, C)``."""
    tile = stencil_tile(y.shape[1])
    grid, count = _programs(y, tile)
    constants = axes((grad.shape[1], grad.shape[2]), (y.shape[2], y.shape[3]), stencil)
    return Launch(
        patch_max_pool2d_grad_kernel,
        grid,
        (grad, tap, y, *row_major(slot, coords), count, slot.shape[1], slot.shape[2], y.shape[1]),
        constants | {"BLOCK_M": tile.m, "BLOCK_C": tile.n},
        tile.warps,
        tile.stages,
    )
