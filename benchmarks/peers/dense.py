"""Whole images: plain dense convolution, the thing to beat, and dense-and-mask, as SparK does it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchsparse import pack, testing, unpack
from patchsparse.onednn import keep_clear

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer

__all__ = ["Dense", "DenseAndMask"]


class _DenseLayer(Layer):
    """A convolution of whole channels_last images."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.conv = conv_of(p)
        self.weight = self.conv.weight

    def build_map(self) -> None:
        """Do nothing: whole images need no map."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def operand(self, packed: Tensor) -> Tensor:
        return unpack(packed, self.p.grid)

    def direction(self, packed: Tensor) -> Tensor:
        return unpack(packed, self.p.grid)

    def packed(self, y: Tensor) -> Tensor:
        return pack(y, self.p.grid)

    def packed_input(self, x: Tensor) -> Tensor:
        return pack(x, self.p.grid)

    def plain_weight(self, weight: Tensor) -> Tensor:
        return weight


class _MaskedLayer(_DenseLayer):
    """The same with its input masked."""

    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        self.masking = testing.DenseAndMask(self.conv, p.grid)
        self.weight = next(self.masking.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.masking(x)


def conv_of(p: Problem) -> nn.Conv2d:
    """Return the convolution of a problem as a module of PyTorch, its weight in channels_last memory."""
    s = p.shape
    conv = nn.Conv2d(s.c_in, s.c_out, s.k, s.stride, s.k // 2, groups=s.groups, bias=False)
    conv.weight = nn.Parameter(p.weight.detach().clone(memory_format=torch.channels_last))
    keep_clear(conv)
    return conv


class Dense(Peer):
    """Convolve whole images, on a GPU by cuDNN."""

    name = "dense"
    note = "convolves whole channels_last images, by cuDNN on a GPU; no mask at all"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    maps = False
    graphs = True

    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return why it cannot run at all, or not this shape; None if it can."""
        return None

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _DenseLayer(p)


class DenseAndMask(Dense):
    """Set what is inactive to 0 and convolve whole images: SparK's way."""

    name = "dense-and-mask"
    note = "multiplies with the mask and convolves whole channels_last images: SparK's way"

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _MaskedLayer(p)
