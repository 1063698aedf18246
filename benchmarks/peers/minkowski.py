"""MinkowskiEngine 0.5.4: products of pairs found with a hash table; on CPU and GPU, as its users write it.

Nothing of this project's own ``minkowski`` engine takes part: its modules, its sparse tensors, its coordinate keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchsparse import PatchGrid
from patchsparse.backends.minkowski.loading import library, module

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer, to_packed, to_rows
from .sites import rows_at, sites

__all__ = ["Minkowski", "begin", "in_order", "minkowski_weight", "order_of"]


def minkowski_weight(weight: Tensor, depthwise: bool = False, stride: int = 1) -> Tensor:
    """Return a weight as ``(taps, C_in, C_out)``, vertical tap fastest; ``(taps, C)`` if depthwise, a matrix if 1x1."""
    if depthwise:
        return weight[:, 0].permute(2, 1, 0).flatten(0, 1)
    matrices = weight.permute(3, 2, 1, 0).flatten(0, 1)
    return matrices[0] if len(matrices) == 1 and stride == 1 else matrices


def begin(grid: PatchGrid, p: int) -> tuple[Any, Any]:
    """Return a new manager of coordinates and the key of the sites of active patches of ``p`` pixels."""
    kinds = module().CoordinateMapType
    kind = kinds.CUDA if grid.device.type == "cuda" else kinds.CPU
    manager = module().CoordinateManager(D=2, coordinate_map_type=kind)
    return manager, manager.insert_and_map(sites(grid, p), [1, 1], "")[0]


def order_of(grid: PatchGrid, where: Tensor, p: int, spacing: int) -> Tensor:
    """Return the packed row of each row of a sparse tensor, which MinkowskiEngine may reorder.

    Args:
        grid: active patches.
        where: sites ``(M, 3)`` (image, y, x), in pixels of the input.
        p: pixels along a patch of the sparse tensor.
        spacing: pixels of the input between two of its sites.
    """
    here = where.to(torch.long, copy=True)
    here[:, 1:] //= spacing
    return rows_at(grid, p, here).long()


def in_order(rows: Tensor, order: Tensor, p: int) -> Tensor:
    """Return rows ``(N * p * p, C)`` of a sparse tensor as packed ``(N, C, p, p)``; NaN where none came."""
    out = torch.full_like(rows, torch.nan)
    out[order] = rows
    return to_packed(out, p)


class _MinkowskiLayer(Layer):
    """A convolution between the sites of active patches; its map is kept by the coordinate manager."""

    def __init__(self, p: Problem) -> None:
        s = p.shape
        self.p = p
        options = {"kernel_size": s.k, "stride": s.stride, "dimension": 2}
        conv = (
            module().MinkowskiChannelwiseConvolution(s.c_in, **options)
            if s.depthwise
            else module().MinkowskiConvolution(s.c_in, s.c_out, **options)
        )
        self.conv = conv.to(device=p.x.device, dtype=p.x.dtype)
        with torch.no_grad():
            self.conv.kernel.copy_(minkowski_weight(p.weight, s.depthwise, s.stride))
        self.weight = self.conv.kernel

    def build_map(self) -> None:
        """Take a new manager and give it the sites; the pairs are found in the first forward pass."""
        self.manager, self.key = begin(self.p.grid, self.p.shape.p)

    def forward(self, x: Tensor) -> Tensor:
        given = module().SparseTensor(x, coordinate_map_key=self.key, coordinate_manager=self.manager)
        y = self.conv(given)
        self.out_key = y.coordinate_map_key
        return y.F

    def _rows(self, key: Any, side: int, stride: int) -> Tensor:
        return order_of(self.p.grid, self.manager.get_coordinates(key), side, stride)

    def _given(self, packed: Tensor, key: Any, side: int, stride: int) -> Tensor:
        return to_rows(packed)[self._rows(key, side, stride)]

    def _taken(self, rows: Tensor, key: Any, side: int, stride: int) -> Tensor:
        return in_order(rows, self._rows(key, side, stride), side)

    def operand(self, packed: Tensor) -> Tensor:
        return self._given(packed, self.key, self.p.shape.p, 1)

    def direction(self, packed: Tensor) -> Tensor:
        with torch.no_grad():
            self.forward(self.operand(self.p.x))  # names the sites of the output
        return self._given(packed, self.out_key, self.p.shape.out_p, self.p.shape.stride)

    def packed(self, y: Tensor) -> Tensor:
        return self._taken(y, self.out_key, self.p.shape.out_p, self.p.shape.stride)

    def packed_input(self, x: Tensor) -> Tensor:
        return self._taken(x, self.key, self.p.shape.p, 1)

    def plain_weight(self, weight: Tensor) -> Tensor:
        s = self.p.shape
        square = weight.reshape(s.k, s.k, *((s.c_in,) if s.depthwise else (s.c_in, s.c_out)))
        return square.permute(2, 1, 0)[:, None] if s.depthwise else square.permute(3, 2, 1, 0)


class Minkowski(Peer):
    """``MinkowskiConvolution`` and ``MinkowskiChannelwiseConvolution``."""

    name = "minkowski"
    note = "float32 and float64 only; both gradients at once; depthwise in PyTorch, one tap after the other"
    dtypes = (torch.float32,)
    parts = False

    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return why it cannot run at all, or not this shape; None if it can."""
        if shape is not None and shape.groups != 1 and not shape.depthwise:
            return "minkowski has no grouped convolution other than depthwise"
        return library().problem

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _MinkowskiLayer(p)
