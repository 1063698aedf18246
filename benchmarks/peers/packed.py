"""This project's own engines behind the interface of the peers, so that all are run by the same code."""

from __future__ import annotations

import torch
from torch import Tensor

from patchsparse import patch_conv2d
from patchsparse.backends import why_not
from patchsparse.geometry import Call, Stencil

from ..subjects.convolutions import Problem, Shape, fresh
from .base import Layer, Peer

__all__ = ["Packed"]


class _PackedLayer(Layer):
    def __init__(self, p: Problem, backend: str) -> None:
        self.p = p
        self.backend = backend
        self.grid = p.grid
        self.weight = p.weight.detach().clone(memory_format=torch.channels_last).requires_grad_()

    def build_map(self) -> None:
        """Take new maps, so that orders of rows and lists of pairs, which are kept with them, are built again."""
        self.grid = fresh(self.p.grid)

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.p.options
        options = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
        return patch_conv2d(x, self.weight, None, self.grid, *options, backend=self.backend)

    def operand(self, packed: Tensor) -> Tensor:
        return packed

    def direction(self, packed: Tensor) -> Tensor:
        return packed

    def packed(self, y: Tensor) -> Tensor:
        return y

    def packed_input(self, x: Tensor) -> Tensor:
        return x

    def plain_weight(self, weight: Tensor) -> Tensor:
        return weight


class Packed(Peer):
    """One of the engines of patchsparse, or ``"auto"``, which always finds one."""

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    graphs = True

    def __init__(self, backend: str, device: str = "cuda") -> None:
        self.name = backend
        self.note = "this project; its map is the order of rows and the lists of pairs for small patches"
        self._device = device

    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return why it cannot run at all, or not this shape; None if it can."""
        if self.name == "auto":
            return None
        s = shape or Shape(1, 64, 64)
        stencil = Stencil((s.k, s.k), (s.stride, s.stride), (s.k // 2, s.k // 2))
        return why_not(
            self.name, Call("conv2d", self._device, self.dtypes[0], 1, (s.p, s.p), s.c_in, s.c_out, stencil, s.groups)
        )

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _PackedLayer(p, self.name)
