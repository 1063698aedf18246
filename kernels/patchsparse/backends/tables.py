"""Row tables: which packed row each halo pixel or kernel tap reads, derived from the slot map.

A packed tensor ``(N, C, ph, pw)`` in channels_last memory is a matrix of ``N * ph * pw`` rows of C values; every
neighbourhood operation is then a gather of rows. Tables depend on the grid, the patch size and the stencil alone, so
the layers of a stage share them: they are remembered for as long as the slot map lives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..geometry import Stencil
from ..maps import check_maps, ordinary

__all__ = ["OUTSIDE", "TapPairs", "adjoint_bags", "halo_rows", "remember", "tap_pairs", "tap_rows"]

INACTIVE = -1
OUTSIDE = -2

T = TypeVar("T")

# A memo of pure functions of a slot map, not state: entries die with the map, and a map changed in place is recomputed.
_memo: WeakIdKeyDictionary = WeakIdKeyDictionary()
_building = threading.RLock()  # threads that share a grid wait for the one that builds; a builder may ask for more


def remember(slot: Tensor, key: tuple[Any, ...], build: Callable[[], T]) -> T:
    """Return ``build()``, computed once per slot map and key; each time for a map made in inference mode.

    Such a map does not tell when it is changed. What is built in inference mode for any other serves training, too.
    """
    entry = _memo.get(slot)
    if entry is None and slot.is_inference():
        return build()
    if entry is None or entry[0] != slot._version:
        entry = _memo[slot] = (slot._version, {})
    tables = entry[1]
    if key not in tables:
        with _building:
            if key not in tables:
                tables[key] = ordinary(build)()
    return tables[key]


def _rows_at(slot: Tensor, coords: Tensor, size: tuple[int, int], v: Tensor, h: Tensor) -> Tensor:
    """Return ``(N, len(v), len(h))`` int64: the packed row at pixel (v, h) relative to each active patch.

    ``v`` and ``h`` are pixel offsets from the patch's first pixel and may lie any number of patches away.
    ``INACTIVE`` marks pixels of inactive patches, ``OUTSIDE`` those beyond the image.
    """
    height, width = size
    grid_rows, grid_columns = slot.shape[1:]
    image, row, column = coords.long().unbind(1)
    row = row[:, None] + torch.div(v, height, rounding_mode="floor")  # (N, V)
    column = column[:, None] + torch.div(h, width, rounding_mode="floor")  # (N, H)
    inside = ((row >= 0) & (row < grid_rows))[:, :, None] & ((column >= 0) & (column < grid_columns))[:, None, :]
    neighbour = slot[
        image[:, None, None],
        row.clamp(0, grid_rows - 1)[:, :, None],
        column.clamp(0, grid_columns - 1)[:, None, :],
    ].long()
    pixel = (v % height)[:, None] * width + h % width  # (V, H)
    rows = torch.where(neighbour >= 0, neighbour * (height * width) + pixel, INACTIVE)
    return torch.where(inside, rows, OUTSIDE)


def halo_rows(
    slot: Tensor, coords: Tensor, size: tuple[int, int], before: tuple[int, int], after: tuple[int, int]
) -> Tensor:
    """Return ``(N, before + ph + after, before + pw + after)`` rows of each patch with its halo."""

    def build() -> Tensor:
        check_maps(slot, coords)
        v = torch.arange(-before[0], size[0] + after[0], device=slot.device)
        h = torch.arange(-before[1], size[1] + after[1], device=slot.device)
        return _rows_at(slot, coords, size, v, h)

    return remember(slot, ("halo", size, before, after), build)


def tap_rows(slot: Tensor, coords: Tensor, size: tuple[int, int], stencil: Stencil) -> Tensor:
    """Return ``(M, taps)``: the input row that each output row reads at each tap, M = output pixels of all patches."""
    check_maps(slot, coords)
    axes = []
    for axis in range(2):
        out = torch.arange(size[axis] // stencil.stride[axis], device=slot.device) * stencil.stride[axis]
        tap = torch.arange(stencil.kernel[axis], device=slot.device) * stencil.dilation[axis] - stencil.padding[axis]
        axes.append((out[:, None] + tap).flatten())
    rows = _rows_at(slot, coords, size, *axes)
    out_height, out_width = stencil.output_size(size)
    rows = rows.view(-1, out_height, stencil.kernel[0], out_width, stencil.kernel[1])
    return rows.permute(0, 1, 3, 2, 4).reshape(-1, stencil.taps)


class TapPairs(NamedTuple):
    """The (active output, active input) pairs of a convolution, grouped by tap.

    Attributes:
        counts: pairs of each tap, in kernel order.
        inputs: ``(P,)`` int64 input row of each pair.
        outputs: ``(P,)`` int64 output row of each pair.
        by_output: bags of pairs per output row, as :func:`bags` returns them.
        by_input: bags of pairs per input row.
    """

    counts: list[int]
    inputs: Tensor
    outputs: Tensor
    by_output: tuple[Tensor, Tensor]
    by_input: tuple[Tensor, Tensor]


def bags(rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return ``(members, offsets)``: for each of ``total`` rows the positions in ``rows`` that name it.

    Negative entries belong to no row. Members of a bag keep their order, so sums over a bag are deterministic.
    """
    members = torch.argsort(rows, stable=True)
    ordered = rows[members]
    offsets = torch.searchsorted(ordered, torch.arange(total + 1, device=rows.device))
    return members[offsets[0] :], offsets[:-1] - offsets[0]


def tap_pairs(slot: Tensor, coords: Tensor, size: tuple[int, int], stencil: Stencil) -> TapPairs:
    """Return the active pairs of a convolution; on a GPU this synchronises with the host once per grid and stage."""

    def build() -> TapPairs:
        rows = tap_rows(slot, coords, size, stencil).t()  # (taps, M)
        tap, outputs = (rows >= 0).nonzero(as_tuple=True)
        inputs = rows[tap, outputs]
        counts = torch.bincount(tap, minlength=stencil.taps).tolist()
        by_output = bags(outputs, rows.shape[1])
        by_input = bags(inputs, coords.shape[0] * size[0] * size[1])
        return TapPairs(counts, inputs, outputs, by_output, by_input)

    return remember(slot, ("pairs", size, stencil), build)


def adjoint_bags(
    slot: Tensor, coords: Tensor, size: tuple[int, int], before: tuple[int, int], after: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return, for each packed row, the halo pixels that read it: the gather that undoes :func:`halo_rows`."""

    def build() -> tuple[Tensor, Tensor]:
        rows = halo_rows(slot, coords, size, before, after)
        return bags(rows.flatten(), coords.shape[0] * size[0] * size[1])

    return remember(slot, ("adjoint", size, before, after), build)
