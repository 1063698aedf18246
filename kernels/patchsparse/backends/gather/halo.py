"""Each patch with its halo, and back: gathers of rows, from which every other operation is made."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tables

__all__ = ["Size", "as_rows", "from_rows", "halo", "halo_adjoint", "patch_size", "sum_bags"]

Size = tuple[int, int]


def as_rows(x: Tensor) -> Tensor:
    """View ``(N, C, ph, pw)`` as the matrix ``(N * ph * pw, C)``; copies only if not channels_last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])


def from_rows(rows: Tensor, count: int, size: Size) -> Tensor:
    """View the matrix ``(N * ph * pw, C)`` as ``(N, C, ph, pw)`` in channels_last memory."""
    return rows.view(count, size[0], size[1], rows.shape[1]).permute(0, 3, 1, 2)


def patch_size(x: Tensor) -> Size:
    """Return the height and width of the patches ``(N, C, ph, pw)``, in pixels."""
    return x.shape[2], x.shape[3]


def halo(x: Tensor, slot: Tensor, coords: Tensor, before: Size, after: Size, outside: float = 0.0) -> Tensor:
    """Return ``(N, C, before + ph + after, before + pw + after)``: each patch with its halo.

    Pixels of inactive patches read as 0, pixels beyond the image as ``outside``.
    """
    if before == after == (0, 0):
        return x
    matrix = as_rows(x)
    rows = tables.halo_rows(slot, coords, patch_size(x), before, after)
    fills = (matrix.new_full((1, matrix.shape[1]), value) for value in (0.0, outside))
    source = torch.cat((matrix, *fills))  # row -1 (inactive) is the first fill, row -2 (outside) the second
    at = torch.where(rows >= 0, rows, matrix.shape[0] - 1 - rows).flatten()
    return from_rows(source.index_select(0, at), x.shape[0], (rows.shape[1], rows.shape[2]))


def sum_bags(values: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """Return for each bag the sum of ``values[members]``; the sum over no members is 0."""
    if values.shape[0] == 0:
        return values.new_zeros(offsets.shape[0], values.shape[1])
    return torch.embedding_bag(values, members, offsets, False, 0)[0]


def halo_adjoint(tile: Tensor, slot: Tensor, coords: Tensor, size: Size, before: Size, after: Size) -> Tensor:
    """Return ``(N, C, ph, pw)``: the sum of every halo pixel onto the packed pixel that it was read from."""
    if before == after == (0, 0):
        return tile
    bags = tables.adjoint_bags(slot, coords, size, before, after)
    return from_rows(sum_bags(as_rows(tile), *bags), tile.shape[0], size)
