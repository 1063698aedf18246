"""Active pixels as sparse-convolution libraries want them: coordinates, tables of neighbours, rows of coordinates.

Rows are in the order of the packed tensor: patch by patch, each row-major. Plain PyTorch, on any device, and built from
the coordinates of the patches alone, so that it is an independent check of the kernels' slot map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchsparse import PatchGrid

__all__ = ["image_offsets", "neighbours", "pixel_rows", "rows_at", "sites"]


def sites(grid: PatchGrid, p: int) -> Tensor:
    """Return ``(N * p * p, 3)`` int32, (image, y, x) in pixels of every row of a packed ``(N, C, p, p)``."""
    inner = torch.arange(p, dtype=torch.int32, device=grid.device)
    image, row, column = (grid.coords[:, i, None, None] for i in range(3))
    parts = (image, row * p + inner[:, None], column * p + inner)
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1).reshape(-1, 3)


def pixel_rows(grid: PatchGrid, p: int) -> Tensor:
    """Return ``(B, H, W)`` int32, the row of every pixel of the images, -1 where inactive."""
    where = sites(grid, p).long()
    size = (grid.batch_size, grid.shape[0] * p, grid.shape[1] * p)
    table = torch.full(size, -1, dtype=torch.int32, device=grid.device)
    table[where[:, 0], where[:, 1], where[:, 2]] = torch.arange(len(where), dtype=torch.int32, device=grid.device)
    return table


def neighbours(grid: PatchGrid, p: int, k: int) -> Tensor:
    """Return ``(N * p * p, k * k)`` int32: the row that each tap of a centred odd kernel reads, -1 if there is none."""
    where, reach = sites(grid, p).long(), k // 2
    padded = torch.nn.functional.pad(pixel_rows(grid, p), (reach,) * 4, value=-1)
    taps = torch.arange(k, device=grid.device)
    y = where[:, 1, None, None] + taps[:, None]
    x = where[:, 2, None, None] + taps
    return padded[where[:, 0, None, None], y, x].flatten(1)


def rows_at(grid: PatchGrid, p: int, where: Tensor) -> Tensor:
    """Return the packed rows at ``where`` ``(M, 3)`` (image, y, x), -1 for pixels that are inactive."""
    image, y, x = where.long().unbind(1)
    return pixel_rows(grid, p)[image, y, x]


def image_offsets(grid: PatchGrid, p: int) -> Tensor:
    """Return ``(B + 1,)`` int64 on the CPU, where the rows of each image begin; they must be sorted by image."""
    counts = grid.counts().cpu() * p * p
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
