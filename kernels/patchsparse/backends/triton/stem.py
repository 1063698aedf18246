"""Convolution with few input channels on the Triton engine: launches of ``stem_kernels.py``.

Rows of few values are copied two bytes at a time and leave most of a tensor core's step empty. So blocks of ``stride x
stride`` pixels become one cell each (space-to-depth), and the convolution one of stride 1 over cells: 12 channels at
stride 2 are 48, 3 are 12, filled up to 16. A 7x7 kernel reads 4x4 cells: two before an output's own and one after it.
The weight is laid out likewise on the fly, and its gradient laid back, so that nothing of this is seen from outside.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...eager import once
from ...geometry import Stencil
from . import conv, tuning
from .configs import Tile, programs_of, shared_memory, splits_of
from .conv import Operand, kind_of
from .launch import Launch, as_rows, processors, row_major, rows_like
from .stem_configs import stem_tiles, stem_wgrad_tiles
from .stem_kernels import (
    patch_cell_weight_kernel,
    patch_cells_kernel,
    patch_footprint_fwd_kernel,
    patch_footprint_wgrad_kernel,
    sum_cell_splits_kernel,
)
from .tf32 import nearest, precision_of
from .tuned import Kind

__all__ = [
    "Cells",
    "cells_launch",
    "cells_of",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "forward_launch",
    "pays",
    "weight_launch",
    "wgrad_launches",
]

Size = tuple[int, int]


@once
def pays(channels: int, size: Size, stencil: Stencil, groups: int) -> bool:
    """Return whether a convolution of patches of ``size`` pixels with ``channels`` input channels is computed here.

    Counted in instructions of a warp, forward and weight gradient together, for an output: by plain rows about 16 for
    each tap; here one for each 8 values that the output reads, and the time of three for each value of a cell, which is
    written and read in both passes. So 12 channels pay with a 7x7 kernel at stride 2 and with 3x3 at stride 1; with 3x3
    at stride 2, only 8 do. Rows of 32 fill a step as they are. A dilated kernel would mostly multiply zeros.
    """
    if channels >= 32 or groups != 1 or stencil.dilation != (1, 1):
        return False
    layout = cells_of(size, stencil, channels, 2)
    if layout.stencil.taps > conv.MOST_TAPS:
        return False
    cells = layout.halo[0] * layout.halo[1]
    return 16 * stencil.taps * layout.rows > layout.total // 8 * layout.rows + 3 * layout.cell * cells


def _axes(size: Size, stencil: Stencil) -> list[tuple[int, ...]]:
    """Return an axis of ``stem_kernels.py`` for each direction."""
    axes = []
    for p, k, s, pad in zip(size, stencil.kernel, stencil.stride, stencil.padding, strict=True):
        before, after = ceil(pad / s), (k - 1 - pad) // s
        axes.append((p // s, before, before + 1 + after, s, pad, k))
    return axes


class Cells(NamedTuple):
    """How patches are laid out as cells.

    Attributes:
        v: vertical axis, as ``stem_kernels.py`` describes it.
        h: horizontal axis.
        channels: of a pixel.
        cell: values of a cell, filled up to whole 16 bytes.
    """

    v: tuple[int, ...]
    h: tuple[int, ...]
    channels: int
    cell: int

    @property
    def total(self) -> int:
        """Values that an output reads."""
        return self.v[2] * self.h[2] * self.cell

    @property
    def rows(self) -> int:
        """Outputs of a patch."""
        return self.v[0] * self.h[0]

    @property
    def halo(self) -> Size:
        """Cells of a patch with its halo."""
        return self.v[0] + self.v[2] - 1, self.h[0] + self.h[2] - 1

    @property
    def stencil(self) -> Stencil:
        """The convolution over cells."""
        return Stencil((self.v[2], self.h[2]), (1, 1), (self.v[1], self.h[1]))

    @property
    def constants(self) -> dict[str, tuple[int, ...] | int]:
        """Constants that all kernels but the first take."""
        return {"V": self.v, "H": self.h, "CELL": self.cell}


@once
def cells_of(size: Size, stencil: Stencil, channels: int, itemsize: int) -> Cells:
    """Return how patches of ``size`` pixels are laid out for a convolution."""
    v, h = _axes(size, stencil)
    whole = 16 // itemsize
    return Cells(v, h, channels, ceil(v[3] * h[3] * channels / whole) * whole)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in, kh, kw)``."""
    layout = cells_of((x.shape[2], x.shape[3]), stencil, x.shape[1], x.element_size())
    cells, taps = _as_cells(x, slot, coords, layout), nearest(_cell_weight(weight, layout))
    bias = None if bias is None else bias.contiguous()
    tiles = stem_tiles(weight.shape[0], layout.total, x.element_size(), _tensor_cores(x))

    def run(tile: Tile) -> Tensor:
        y = rows_like(x, x.shape[0], (layout.v[0], layout.h[0]), weight.shape[0])
        forward_launch(cells, taps, bias, y, layout, tile).run()
        return y

    return tuning.best(_kind("conv2d", x, stencil, weight.shape[0], slot), tiles, run)


def conv2d_dgrad(grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``: that at its cells, laid out as pixels."""
    layout = cells_of(size, stencil, weight.shape[1], grad.element_size())
    taps = _cell_weight(weight, layout).permute(0, 3, 1, 2)
    cells = conv.conv2d_dgrad(grad, taps, slot, coords, (layout.v[0], layout.h[0]), layout.stencil, 1)
    rows = as_rows(cells)[..., : layout.v[3] * layout.h[3] * layout.channels]
    rows = rows.unflatten(3, (layout.v[3], layout.h[3], layout.channels))  # (N, v, h, a, b, C)
    return rows.transpose(2, 3).reshape(-1, *size, layout.channels).permute(0, 3, 1, 2)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> Tensor:
    """Return the weight gradient ``(C_out, C_in, kh, kw)``, summed in an order that never changes.

    Cells are written again: keeping them from the forward pass would take more memory than the patches themselves.
    """
    layout = cells_of((x.shape[2], x.shape[3]), stencil, x.shape[1], x.element_size())
    cells, rows = _as_cells(x, slot, coords, layout), nearest(as_rows(grad))
    tiles = stem_wgrad_tiles(layout.total, x.element_size(), _tensor_cores(x))

    def run(tile: Tile) -> Tensor:
        weight = rows_like(x, grad.shape[1], stencil.kernel, layout.channels)
        for launch in wgrad_launches(cells, rows, weight, layout, tile):
            launch.run()
        return weight

    return tuning.best(_kind("conv2d_wgrad", x, stencil, grad.shape[1], slot), tiles, run)


def _tensor_cores(x: Tensor) -> bool:
    return x.dtype != torch.float32 or precision_of(x) == "tf32"


def _kind(name: str, x: Tensor, stencil: Stencil, c_out: int, slot: Tensor) -> Kind:
    return kind_of(name, Operand.of(x, slot), stencil, (x.shape[1], c_out), 1)


def _as_cells(x: Tensor, slot: Tensor, coords: Tensor, layout: Cells) -> Tensor:
    rows = as_rows(x)
    cells = x.new_empty(x.shape[0], *layout.halo, layout.cell)
    cells_launch(rows, cells, slot, coords, layout).run()
    return cells


def _cell_weight(weight: Tensor, layout: Cells) -> Tensor:
    taps = weight.new_empty(weight.shape[0], layout.v[2], layout.h[2], layout.cell)
    weight_launch(weight, taps, layout).run()
    return taps


def cells_launch(rows: Tensor, cells: Tensor, slot: Tensor, coords: Tensor, layout: Cells) -> Launch:
    """Return the launch that fills ``cells`` ``(N, *halo, cell)`` from ``rows`` ``(N, ph, pw, C)``."""
    run = layout.h[3] * layout.channels * rows.element_size()  # bytes
    unit = next(u for u in (8, 4, 2) if run % u == 0 and rows.storage_offset() * rows.element_size() % u == 0)
    units, run = layout.cell * rows.element_size() // unit, run // unit
    block = max(2, 1 << (units - 1).bit_length())
    height = max(1, 1024 // block)
    number = layout.halo[0] * layout.halo[1]
    return Launch(
        patch_cells_kernel,
        (cells.shape[0], ceil(number / height), 1),
        (*(t.view(-1).view(_UNITS[unit]) for t in (rows, cells)), *row_major(slot, coords), *slot.shape[1:]),
        {"V": layout.v, "H": layout.h, "RUN": run, "UNITS": units, "BLOCK_M": height, "BLOCK_N": block},
        4,
        1,
    )


_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def weight_launch(weight: Tensor, taps: Tensor, layout: Cells) -> Launch:
    """Return the launch that fills ``taps`` ``(C_out, *reach, cell)`` from ``weight`` ``(C_out, C_in, kh, kw)``."""
    block = 512
    arguments = (weight, taps, taps.numel(), layout.channels, *weight.stride())
    constants = layout.constants | {"BLOCK": block}
    return Launch(patch_cell_weight_kernel, (ceil(taps.numel() / block), 1, 1), arguments, constants, 4, 1)


def forward_launch(cells: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor, layout: Cells, tile: Tile) -> Launch:
    """Return the launch that fills ``y`` ``(N, C_out, *)`` from cells and their weights ``taps``."""
    count, c_out = y.shape[0] * layout.rows, y.shape[1]
    return Launch(
        patch_footprint_fwd_kernel,
        (ceil(count / tile.m) * ceil(c_out / tile.n), 1, 1),
        (cells, taps, bias, y, count, c_out),
        layout.constants | _blocks(cells, tile),
        tile.warps,
        tile.stages,
    )


def wgrad_launches(cells: Tensor, grad: Tensor, weight: Tensor, layout: Cells, tile: Tile) -> list[Launch]:
    """Return the launches that fill ``weight`` ``(C_out, C_in, kh, kw)`` from cells and ``grad`` ``(N, *, C_out)``."""
    count, c_out = cells.shape[0] * layout.rows, grad.shape[3]
    tiles = ceil(c_out / tile.m) * ceil(layout.total / tile.n)
    slots = processors(cells.device) * programs_of(tile, cells.element_size(), shared_memory(cells.device))
    splits = splits_of(tiles, slots, max(1, count // (4 * tile.k)))
    parts = cells.new_empty(splits, c_out, layout.total, dtype=torch.float32)
    partial = Launch(
        patch_footprint_wgrad_kernel,
        (tiles * splits, 1, 1),
        (cells, grad, parts, count, c_out, splits),
        layout.constants | _blocks(cells, tile),
        tile.warps,
        tile.stages,
    )
    block = 256
    arguments = (parts, weight, weight.numel(), splits, c_out * layout.total, layout.channels)
    constants = layout.constants | {"BLOCK": block}
    return [partial, Launch(sum_cell_splits_kernel, (ceil(weight.numel() / block), 1, 1), arguments, constants, 4, 1)]


def _blocks(x: Tensor, tile: Tile) -> dict[str, int | str]:
    return {"PRECISION": precision_of(x), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
