"""What row tables hold, in plain PyTorch: the definition that the kernels are compared with."""

import torch
from torch import Tensor

from patchsparse import PatchGrid
from patchsparse.backends.tables import tap_rows
from patchsparse.backends.triton.row_tables import GROUP, Listed, RowTable
from patchsparse.geometry import Stencil

Size = tuple[int, int]


def row_table(grid: PatchGrid, size: Size, stencil: Stencil, transposed: bool, by_taps: bool) -> RowTable:
    """Return what `patchsparse.backends.triton.row_tables.row_table` must return."""
    sources = _sources(grid, size, stencil, transposed)
    if not transposed and not by_taps:
        return RowTable(sources.int(), None, None)
    powers = torch.ones((), dtype=torch.int64) << torch.arange(stencil.taps)
    taps = ((sources >= 0) * powers[:, None]).sum(0)
    order = _order_by_taps(taps, stencil.taps) if by_taps else _order_by_position(grid.num_active, size, stencil)
    return RowTable(sources[:, order].int(), order.int(), taps[order])


def _sources(grid: PatchGrid, size: Size, stencil: Stencil, transposed: bool) -> Tensor:
    """Return ``(taps, M)`` int64 source rows. At one tap an input pixel is read by at most one output pixel."""
    forward = tap_rows(grid.slot, grid.coords, size, stencil).t().clamp(min=-1)
    if not transposed:
        return forward
    inputs = grid.num_active * size[0] * size[1]
    outputs = torch.arange(forward.shape[1]).expand_as(forward)
    readers = outputs.new_full((stencil.taps, inputs + 1), -1)
    return readers.scatter_(1, torch.where(forward >= 0, forward, inputs), outputs)[:, :inputs]


def _order_by_position(count: int, size: Size, stencil: Stencil) -> Tensor:
    """Return the rows of ``count`` input patches by the position of their pixels modulo the stride."""
    (height, width), (down, across) = size, stencil.stride
    rows = torch.arange(count * height * width)
    return rows.view(count, height // down, down, width // across, across).permute(2, 4, 0, 1, 3).flatten()


def _order_by_taps(taps: Tensor, number: int) -> Tensor:
    """Return the order of rows by their tap bits, groups of rows that need the most of ``number`` taps first."""
    rank = taps
    for shift in (1, 2, 4, 8, 16, 32):  # the place of a bit set in the Gray code: neighbours there differ in one bit
        rank = rank ^ (rank >> shift)
    order = torch.sort(rank, stable=True).indices
    whole = order.numel() // GROUP * GROUP
    groups = order[:whole].view(-1, GROUP)
    bits = torch.arange(number)
    needed = (taps[groups][:, :, None] >> bits & 1).amax(1).sum(1)
    groups = groups[torch.sort(needed, descending=True, stable=True).indices]
    return torch.cat((groups.flatten(), order[whole:]))


def listed_rows(grid: PatchGrid, size: Size, stencil: Stencil, together: int) -> Listed:
    """Return what `patchsparse.backends.triton.row_tables.listed_rows` must return."""
    sources = tap_rows(grid.slot, grid.coords, size, stencil).t()
    active = (sources >= 0).unflatten(0, (-1, together)).any(1)
    targets = torch.sort(~active, dim=1, stable=True).indices
    listed = torch.where(active, 1, 0).gather(1, targets).bool()
    sources = sources.gather(1, targets.repeat_interleave(together, 0)).clamp(min=-1)
    sources = torch.where(listed.repeat_interleave(together, 0), sources, -1)
    return Listed(sources.int(), targets.int(), active.sum(1, dtype=torch.int32))
