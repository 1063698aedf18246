"""Row tables: which source row each target row reads at each tap, as the convolution kernels read them.

A packed tensor ``(N, C, ph, pw)`` in channels_last memory is a matrix of ``N * ph * pw`` rows of C values. A kernel
writes *target* rows and reads *source* rows: output and input pixels of the convolution, or, with ``transposed``, input
and output pixels (the input gradient). ``size`` and ``stencil`` are always those of the convolution itself: patches of
``size`` input pixels. M is the number of target rows.

Tables depend on the grid, the patch size and the stencil alone, so the layers of a stage share them: they are
remembered for as long as the slot map lives. All are built on the device, without waiting for it:

- :func:`row_table` gives the sources of all target rows, in the order in which tiles of a kernel take them;
- :func:`listed_rows` gives, for each group of taps, only the target rows that have an active source at one of them.

The builders are plain PyTorch: they say what a table holds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Stencil
from ..tables import remember, tap_rows

__all__ = ["Listed", "RowTable", "active_share", "listed_rows", "row_table", "turned"]

GROUP = 128  # rows that stay together when tiles are put in order: a multiple of the height of every tile
Size = tuple[int, int]


class RowTable(NamedTuple):
    """The source rows of all target rows; position i of each tensor belongs to the i-th row that a kernel takes.

    Attributes:
        sources: ``(taps, M)`` int32, the source row at each tap, negative if there is none.
        order: ``(M,)`` int32, the target row at each position; None if it is the position itself.
        taps: ``(M,)`` int64, bit t set if tap t has a source; None where ``order`` is.
    """

    sources: Tensor
    order: Tensor | None
    taps: Tensor | None


class Listed(NamedTuple):
    """For each group of consecutive taps the target rows that have a source at any tap of the group, ascending.

    Attributes:
        sources: ``(taps, M)`` int32, the source row at a tap of the i-th listed row of its group; negative if there is
            none, and beyond the last listed row.
        targets: ``(groups, M)`` int32, the listed target rows of each group; beyond the last one any valid row.
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
        sources = _sources(slot, coords, size, stencil, transposed)
        if not transposed and not by_taps:
            return RowTable(sources.int().contiguous(), None, None)
        powers = torch.ones((), dtype=torch.int64, device=slot.device) << torch.arange(stencil.taps, device=slot.device)
        taps = ((sources >= 0) * powers[:, None]).sum(0)
        if by_taps:
            order = _order_by_taps(taps, stencil.taps)
        else:
            order = _order_by_position(len(coords), size, stencil, slot.device)
        return RowTable(sources[:, order].int().contiguous(), order.int(), taps[order])

    return remember(slot, ("triton row table", size, stencil, transposed, by_taps), build)


def _sources(slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, transposed: bool) -> Tensor:
    """Return ``(taps, M)`` int64 source rows. At one tap an input pixel is read by at most one output pixel."""
    forward = tap_rows(slot, coords, size, stencil).t()
    if not transposed:
        return forward
    inputs = len(coords) * size[0] * size[1]
    outputs = torch.arange(forward.shape[1], device=slot.device).expand_as(forward)
    readers = outputs.new_full((stencil.taps, inputs + 1), -1)
    return readers.scatter_(1, torch.where(forward >= 0, forward, inputs), outputs)[:, :inputs]


def _order_by_position(count: int, size: Size, stencil: Stencil, device: torch.device) -> Tensor:
    """Return the rows of ``count`` input patches by the position of their pixels modulo the stride."""
    (height, width), (down, across) = size, stencil.stride
    rows = torch.arange(count * height * width, device=device)
    return rows.view(count, height // down, down, width // across, across).permute(2, 4, 0, 1, 3).flatten()


def _order_by_taps(taps: Tensor, number: int) -> Tensor:
    """Return the order of rows by their tap bits, groups of rows that need the most of ``number`` taps first."""
    rank = taps
    for shift in (1, 2, 4, 8, 16, 32):  # the place of a bit set in the Gray code: neighbours there differ in one bit
        rank = rank ^ (rank >> shift)
    order = torch.sort(rank, stable=True).indices
    whole = order.numel() // GROUP * GROUP
    groups = order[:whole].view(-1, GROUP)
    bits = torch.arange(number, device=taps.device)
    needed = (taps[groups][:, :, None] >> bits & 1).amax(1).sum(1)
    groups = groups[torch.sort(needed, descending=True, stable=True).indices]
    return torch.cat((groups.flatten(), order[whole:]))


def listed_rows(slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, together: int = 1) -> Listed:
    """Return the output rows of a convolution that are active at one of ``together`` consecutive taps.

    Raises:
        ValueError: if ``together`` does not divide the number of taps.
    """
    if stencil.taps % together:
        raise ValueError(f"together must divide the {stencil.taps} taps of the stencil, got {together}")

    def build() -> Listed:
        sources = tap_rows(slot, coords, size, stencil).t()
        active = (sources >= 0).unflatten(0, (-1, together)).any(1)
        targets = torch.sort(~active, dim=1, stable=True).indices
        listed = torch.where(active, 1, 0).gather(1, targets).bool()
        sources = sources.gather(1, targets.repeat_interleave(together, 0))
        sources = torch.where(listed.repeat_interleave(together, 0), sources, -1)
        return Listed(sources.int().contiguous(), targets.int().contiguous(), active.sum(1, dtype=torch.int32))

    return remember(slot, ("triton listed rows", size, stencil, together), build)
