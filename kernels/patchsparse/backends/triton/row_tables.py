"""Row tables: which source row each target row reads at each tap, as the convolution kernels read them.

A packed tensor ``(N, C, ph, pw)`` in channels_last memory is a matrix of ``N * ph * pw`` rows of C values. A kernel
writes *target* rows and reads *source* rows: output and input pixels of the convolution, or, with ``transposed``, input
and output pixels (the input gradient). ``size`` and ``stencil`` are always those of the convolution itself: patches of
``size`` input pixels. M is the number of target rows.

Tables depend on the grid, the patch size and the stencil alone, so the layers of a stage share them: they are
remembered for as long as the slot map lives. All are built on the device, without waiting for it:

- :func:`row_table` gives the sources of all target rows, in the order in which tiles of a kernel take them;
- :func:`listed_rows` gives, for each group of taps, only the target rows that have an active source at one of them.

A kernel of ``row_table_kernels.py`` builds a table, with a sort before it if rows are sorted, or a running sum if they
are listed. ``tests/kernels/row_table_definition.py`` says the same in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Stencil
from ..tables import remember
from .launch import Launch, row_major
from .places import axes
from .row_table_kernels import (
    listed_rows_kernel,
    listed_taps_kernel,
    needed_taps_kernel,
    row_table_kernel,
    sorted_row_table_kernel,
    tap_ranks_kernel,
)

__all__ = ["Listed", "RowTable", "active_share", "listed_rows", "row_table", "turned"]

GROUP = 128  # rows that stay together when tiles are put in order: a multiple of the height of every tile
BLOCK = 256  # rows that one program looks up
Size = tuple[int, int]


class RowTable(NamedTuple):
    """The source rows of all target rows; position i of each tensor belongs to the i-th row that a kernel takes.

    Attributes:
        sources: ``(taps, M)`` int32, the source row at each tap, -1 if there is none.
        order: ``(M,)`` int32, the target row at each position; None if it is the position itself.
        taps: ``(M,)`` int64, bit t set if tap t has a source; None where ``order`` is.
    """

    sources: Tensor
    order: Tensor | None
    taps: Tensor | None


class Listed(NamedTuple):
    """For each group of consecutive taps the target rows that have a source at any tap of the group, ascending.

    Attributes:
        sources: ``(taps, M)`` int32, the source row at a tap of the i-th listed row of its group; -1 if there is none,
            and beyond the last listed row.
        targets: ``(groups, M)`` int32, the listed target rows of each group, then the others, both ascending.
        counts: ``(groups,)`` int32, how many rows are listed; stays on the device.
    """

    sources: Tensor
    targets: Tensor
    counts: Tensor


@lru_cache(maxsize=4096)
def active_share(size: Size, stencil: Stencil, density: float) -> float:
    """Return the expected share of (output pixel, tap) pairs that are active if patches are drawn independently."""
    inside = 1.0
    for p, k, s, pad, d in zip(size, stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, strict=True):
        at = [o + t * d - pad for o in range(0, p, s) for t in range(k)]
        inside *= sum(0 <= a < p for a in at) / len(at)
    return inside + (1 - inside) * density


@lru_cache(maxsize=4096)
def turned(stencil: Stencil) -> Stencil:
    """Return the stencil of the input gradient at stride 1, whose tap t is tap ``taps - 1 - t`` of the convolution.

    It is the same stencil if the padding is half the reach, so that both directions share one table.
    """
    axes = zip(stencil.kernel, stencil.padding, stencil.dilation, strict=True)
    top, left = (d * (k - 1) - p for k, p, d in axes)
    return stencil._replace(padding=(top, left))


def row_table(
    slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, transposed: bool = False, by_taps: bool = False
) -> RowTable:
    """Return the row table of a grid, of the convolution or of its input gradient.

    Args:
        slot: ``(B, Gh, Gw)`` int32, the slot map.
        coords: ``(N, 3)`` int32, (image, row, column) of each patch.
        size: pixels of an input patch of the convolution.
        stencil: of the convolution.
        transposed: targets are input pixels, sources the output pixels that read them. They come sorted by their
            position modulo the stride, because rows of one position have the same taps. At stride 1 take the table of
            the :func:`turned` stencil instead.
        by_taps: sort the rows by their sets of active taps in Gray-code order, so that tiles can skip whole taps;
            groups of ``GROUP`` rows with the most taps first, so that the last tiles to run are short. At most 62 taps.
    """

    def build() -> RowTable:
        maps = Maps.of(slot, coords, size, stencil, transposed)
        table = empty_table(maps, ordered=transposed or by_taps)
        for launch in sorted_launches(table, maps) if by_taps else (plain_launch(table, maps),):
            launch.run()
        return table

    return remember(slot, ("triton row table", size, stencil, transposed, by_taps), build)


def listed_rows(slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, together: int = 1) -> Listed:
    """Return the output rows of a convolution that are active at one of ``together`` consecutive taps.

    Raises:
        ValueError: if ``together`` does not divide the number of taps.
    """
    if stencil.taps % together:
        raise ValueError(f"together must divide the {stencil.taps} taps of the stencil, got {together}")

    def build() -> Listed:
        maps = Maps.of(slot, coords, size, stencil, False)
        listed = empty_lists(maps, together)
        for launch in listed_launches(listed, maps, together):
            launch.run()
        return listed

    return remember(slot, ("triton listed rows", size, stencil, together), build)


class Maps(NamedTuple):
    """What all kernels that build tables are given.

    Attributes:
        total: number of target rows.
        tensors: slot map and coordinates, row by row.
        shape: rows and columns of patches.
        constants: axes and direction.
        kinds: positions of target rows that come one after the other.
        taps: of the stencil.
    """

    total: int
    tensors: tuple[Tensor, Tensor]
    shape: Size
    constants: dict[str, Any]
    kinds: Size
    taps: int

    @classmethod
    def of(cls, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, transposed: bool) -> Maps:
        output = stencil.output_size(size)
        source, target = (output, size) if transposed else (size, output)
        constants = axes(source, target, stencil) | {"TRANSPOSED": transposed}
        kinds = stencil.stride if transposed else (1, 1)
        shape = (slot.shape[1], slot.shape[2])
        return cls(len(coords) * target[0] * target[1], row_major(slot, coords), shape, constants, kinds, stencil.taps)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The last arguments of a kernel."""
        return *self.tensors, self.total, *self.shape


def empty_table(maps: Maps, ordered: bool) -> RowTable:
    """Return a table whose values are not there yet."""
    slot, count = maps.tensors[0], maps.total
    order = (slot.new_empty(count), slot.new_empty(count, dtype=torch.int64)) if ordered else (None, None)
    return RowTable(slot.new_empty(maps.taps, count), *order)


def empty_lists(maps: Maps, together: int) -> Listed:
    """Return lists whose values are not there yet; all are empty if there are no rows."""
    slot, groups = maps.tensors[0], maps.taps // together
    counts = slot.new_empty(groups) if maps.total else slot.new_zeros(groups)
    return Listed(slot.new_empty(maps.taps, maps.total), slot.new_empty(groups, maps.total), counts)


def plain_launch(table: RowTable, maps: Maps) -> Launch:
    """Return the launch that fills a table in the order of rows, or of kinds of rows."""
    constants = maps.constants | {"KINDS_V": maps.kinds[0], "KINDS_H": maps.kinds[1], "BLOCK": BLOCK}
    return Launch(row_table_kernel, (ceil(maps.total / BLOCK), 1, 1), (*table, *maps.arguments), constants, 4, 1)


def sorted_launches(table: RowTable, maps: Maps) -> Iterator[Launch]:
    """Yield the launches that fill a table sorted by taps; each needs the results of those before it."""
    groups = maps.total // GROUP
    ranks = table.sources.new_empty(maps.total, dtype=_smallest(maps.taps))
    arguments, blocks = (ranks, *maps.arguments), ceil(maps.total / BLOCK)
    yield Launch(tap_ranks_kernel, (blocks, 1, 1), arguments, maps.constants | {"BLOCK": BLOCK}, 4, 1)
    ranks, rows = torch.sort(ranks, stable=True)
    needed = table.sources.new_empty(groups)
    if groups:
        constants = {"TAPS": maps.taps, "GROUP": GROUP}
        yield Launch(needed_taps_kernel, (groups, 1, 1), (ranks, needed), constants, 4, 1)
    arguments = (*table, rows, ranks, needed, *maps.arguments)
    constants = maps.constants | {"GROUP": GROUP, "BLOCK": BLOCK}
    yield Launch(sorted_row_table_kernel, (ceil(maps.total / GROUP), 1, 1), arguments, constants, 4, 1)


def _smallest(bits: int) -> torch.dtype:
    """Return the smallest type that holds sets of so many taps: what is sorted, and how often it is passed over."""
    return torch.int16 if bits < 16 else torch.int32 if bits < 32 else torch.int64


def listed_launches(listed: Listed, maps: Maps, together: int) -> Iterator[Launch]:
    """Yield the launches that fill lists of rows; each needs the results of those before it."""
    blocks = (ceil(maps.total / BLOCK), len(listed.targets), 1)
    constants = {"V": maps.constants["V"], "H": maps.constants["H"], "TOGETHER": together, "BLOCK": BLOCK}
    active = listed.targets.new_empty(listed.targets.shape, dtype=torch.int8)
    yield Launch(listed_taps_kernel, blocks, (active, *maps.arguments), constants, 4, 1)
    ends = active.cumsum(1, dtype=torch.int32)
    yield Launch(listed_rows_kernel, blocks, (*listed, ends, *maps.arguments), constants, 4, 1)
