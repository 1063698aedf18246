"""Depthwise convolution and max-pooling on the Triton engine: what is launched, and in which tiles.

Depthwise convolution and the gradient of max-pooling run by tiles of pixels, unrolled (``depthwise_kernels.py``), up to
:data:`MOST_TAPS` taps. What has more, or a stride too wide for a tile, runs in a loop over the taps. So does
max-pooling itself, which is bound by memory (``depthwise_pool_kernels.py``).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Stencil
from ..tables import remember
from .configs import Tile, stencil_tile
from .depthwise_kernels import (
    patch_depthwise_tile_fwd_kernel,
    patch_depthwise_tile_wgrad_kernel,
    patch_max_pool2d_tile_grad_kernel,
    sum_parts_kernel,
)
from .depthwise_plan import away, reads, source_side
from .depthwise_pool_kernels import (
    patch_depthwise_fwd_kernel,
    patch_depthwise_wgrad_kernel,
    patch_max_pool2d_fwd_kernel,
    patch_max_pool2d_grad_kernel,
)
from .launch import Launch, as_rows, processors, row_major, rows_like
from .places import axes
from .row_tables import row_table

__all__ = [
    "MOST_TAPS",
    "TileOfPixels",
    "depthwise",
    "depthwise_launch",
    "depthwise_wgrad",
    "depthwise_wgrad_launches",
    "max_pool2d",
    "max_pool2d_grad",
    "pool_grad_launch",
    "pool_launch",
    "source_tiles",
    "tile_of_pixels",
]

Size = tuple[int, int]
Axis = tuple[int, int, int, int, int, int, int, bool]
MOST_TAPS = 64
LANES = 32  # a program is one warp, for which an inactive patch is a branch not taken
MOST_VALUES = 32  # values of a tile that a lane keeps in registers; with the weights of all taps, MOST_WEIGHTS more
MOST_WEIGHTS = 64
WGRAD_WAVES = 8  # programs per multiprocessor that the weight gradient splits its tiles into


class TileOfPixels(NamedTuple):
    """What one program of the unrolled kernels owns: the axes with their tile, and channels."""

    v: Axis
    h: Axis
    channels: int

    @property
    def each(self) -> Size:
        """Tiles of a patch, downwards and across."""
        return self.v[1] // self.v[6], self.h[1] // self.h[6]

    def count(self, patches: int) -> int:
        """Return how many tiles cover the pixels of ``patches`` patches."""
        return patches * self.each[0] * self.each[1]


@lru_cache(maxsize=256)
def tile_of_pixels(
    source: Size, target: Size, stencil: Stencil, transposed: bool, channels: int, weight_gradient: bool = False
) -> TileOfPixels | None:
    """Return the tile that reads fewest values per result and fits the registers; None if none does.

    Channels come in blocks that leave fewest lanes idle, of 128 bytes where that is possible. A lane keeps the sums of
    a tile, and the values of a source tile; a small tile takes more channels, so that a slot serves more of them.
    """
    if stencil.taps > MOST_TAPS:
        return None
    blocks = (LANES, 2 * LANES) if weight_gradient else (LANES, 2 * LANES, 4 * LANES, 8 * LANES)
    padded = {block: ceil(channels / block) * block for block in blocks}
    blocks = [block for block in blocks if padded[block] == min(padded[LANES], padded[2 * LANES])]
    blocks = [block for block in blocks if block > LANES] or blocks
    found: list[tuple[float, int, TileOfPixels]] = []
    for v in _axes(source[0], target[0], stencil, 0, transposed):
        for h in _axes(source[1], target[1], stencil, 1, transposed):
            pixels, read = v[6] * h[6], source_side(v) * source_side(h)
            for block in blocks:
                if max(pixels, read) * block <= MOST_VALUES * LANES:
                    found.append((_reads(v) * _reads(h) / pixels, -block, TileOfPixels(v, h, block)))
    return min(found)[2] if found else None


def _axes(source: int, target: int, stencil: Stencil, i: int, transposed: bool) -> list[Axis]:
    """Return the axis with each tile that divides the target patch, and whose source tile divides the source patch."""
    taps, stride = stencil.kernel[i], stencil.stride[i]
    rest = (stencil.padding[i], stencil.dilation[i])
    step = stride if transposed else 1
    tiles = [t for t in range(step, target + 1, step) if target % t == 0]
    return [(source, target, taps, stride, *rest, tile, transposed) for tile in tiles]


def _reads(axis: Axis) -> int:
    return len({read[:2] for read in reads(axis)})


def source_tiles(slot: Tensor, coords: Tensor, tile: TileOfPixels) -> Tensor:
    """Return ``(tiles, source tiles of each)`` int32: the number of each source tile, -1 if it is not active.

    It is remembered for as long as the slot map lives; all layers with these tiles share it.
    """
    down, across = away(tile.v), away(tile.h)
    around = Stencil((len(down), len(across)), padding=(-down[0], -across[0]))  # of tiles, not of pixels

    def build() -> Tensor:
        return row_table(slot, coords, tile.each, around).sources.t().contiguous()

    return remember(slot, ("triton source tiles", tile.each, around), build)


def _by_tap(weight: Tensor) -> Tensor:
    """Return a weight ``(C, 1, kh, kw)`` as float32 ``(taps, C)``: neighbouring channels are neighbours in memory."""
    rows = weight.new_empty(weight[0].numel(), weight.shape[0], dtype=torch.float32)
    return rows.copy_(weight.flatten(1).t())


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
    source, target, channels = (rows.shape[1], rows.shape[2]), (y.shape[2], y.shape[3]), y.shape[1]
    bias = None if bias is None else bias.contiguous()
    operands = (rows, _by_tap(weight), bias, y)
    tile = tile_of_pixels(source, target, stencil, transposed, channels)
    if tile is not None:
        grid = (tile.count(y.shape[0]) * ceil(channels / tile.channels),)
        constants = {"V": tile.v, "H": tile.h, "CHANNELS": channels, "BLOCK_C": tile.channels}
        constants["KEEP"] = stencil.taps * tile.channels <= MOST_WEIGHTS * LANES
        return Launch(
            patch_depthwise_tile_fwd_kernel, grid, (*operands, source_tiles(slot, coords, tile)), constants, 1, 1
        )
    block = stencil_tile(channels)
    grid, count = _programs(y, block)
    return Launch(
        patch_depthwise_fwd_kernel,
        grid,
        (*operands, *row_major(slot, coords), count, *slot.shape[1:], channels),
        axes(source, target, stencil) | {"TRANSPOSED": transposed, "BLOCK_M": block.m, "BLOCK_C": block.n},
        block.warps,
        block.stages,
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
    source, target, channels = (x.shape[1], x.shape[2]), (grad.shape[1], grad.shape[2]), x.shape[3]
    tile = tile_of_pixels(source, target, stencil, False, channels, weight_gradient=True)
    if tile is None:
        return _large_wgrad_launches(x, grad, weight, slot, coords, stencil)
    blocks, tiles = ceil(channels / tile.channels), tile.count(x.shape[0])
    splits = max(1, min(processors(x.device) * WGRAD_WAVES // blocks, ceil(tiles / 4)))
    parts = x.new_empty(splits, stencil.taps, channels, dtype=torch.float32)
    partial = Launch(
        patch_depthwise_tile_wgrad_kernel,
        (splits * blocks,),
        (x, grad, parts, source_tiles(slot, coords, tile), tiles, splits),
        {"V": tile.v, "H": tile.h, "CHANNELS": channels, "BLOCK_C": tile.channels},
        1,
        1,
    )
    return [partial, _sum_launch(parts, weight)]


def _large_wgrad_launches(
    x: Tensor, grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil
) -> list[Launch]:
    """Return the same by a loop over the rows of the kernel, for any stencil."""
    source, target, channels = (x.shape[1], x.shape[2]), (grad.shape[1], grad.shape[2]), x.shape[3]
    count = grad.shape[0] * target[0] * target[1]
    block_j = 1 << (stencil.kernel[1] - 1).bit_length()
    block_c = stencil_tile(channels).n
    block_m = max(1, 8192 // (block_j * block_c))
    programs = stencil.kernel[0] * ceil(channels / block_c)
    splits = max(1, min(ceil(processors(x.device) * 8 / programs), ceil(count / (4 * block_m))))
    parts = x.new_empty(splits, stencil.taps, channels, dtype=torch.float32)
    partial = Launch(
        patch_depthwise_wgrad_kernel,
        (programs * splits,),
        (x, grad, parts, *row_major(slot, coords), count, *slot.shape[1:], channels, splits),
        axes(source, target, stencil) | {"BLOCK_J": block_j, "BLOCK_M": block_m, "BLOCK_C": block_c},
        4,
        1,
    )
    return [partial, _sum_launch(parts, weight)]


def _sum_launch(parts: Tensor, weight: Tensor) -> Launch:
    """Return the launch that sums ``parts`` ``(splits, taps, C)`` into ``weight`` ``(C, 1, kh, kw)``."""
    splits, taps, channels = parts.shape
    block = 64
    constants = {"TAPS": taps, "BLOCK_S": 32, "BLOCK_C": block}
    return Launch(
        sum_parts_kernel, (taps * ceil(channels / block),), (parts, weight, splits, channels), constants, 4, 1
    )


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
    source, target, channels = (grad.shape[1], grad.shape[2]), (y.shape[2], y.shape[3]), y.shape[1]
    tile = tile_of_pixels(source, target, stencil, True, channels)
    if tile is not None:
        grid = (tile.count(y.shape[0]) * ceil(channels / tile.channels),)
        constants = {"V": tile.v, "H": tile.h, "CHANNELS": channels, "BLOCK_C": tile.channels}
        arguments = (grad, tap, y, source_tiles(slot, coords, tile))
        return Launch(patch_max_pool2d_tile_grad_kernel, grid, arguments, constants, 1, 1)
    block = stencil_tile(channels)
    grid, count = _programs(y, block)
    return Launch(
        patch_max_pool2d_grad_kernel,
        grid,
        (grad, tap, y, *row_major(slot, coords), count, *slot.shape[1:], channels),
        axes(source, target, stencil) | {"BLOCK_M": block.m, "BLOCK_C": block.n},
        block.warps,
        block.stages,
    )
