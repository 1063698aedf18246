"""Whole images: plain dense convolution, the thing to beat, and dense-and-mask, as SparK does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import pack, unpack

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer

__all__ = ["Dense", "DenseAndMask"]


class _DenseLayer(Layer):
    """A convolution of whole channels_last images; with ``masks`` inactive pixels of the output are set to 0."""

    def __init__(self, p: Problem, masks: bool) -> None:
        self.p = p
        self.masks = masks
        self.weight = p.weight.detach().clone(memory_format=torch.channels_last).requires_grad_()

    def build_map(self) -> None:
        """Spread the active patches to pixels of the output."""
        if self.masks:
            size = [patches * self.p.shape.out_p for patches in self.p.grid.shape]
            self.active = self.p.grid.pixels(size)[:, None].to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.p.options
        y = F.conv2d(x, self.weight, None, stride, padding, dilation, groups)
        return y * self.active if self.masks else y

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
        return _DenseLayer(p, masks=False)


class DenseAndMask(Dense):
    """Convolve whole images and set what is inactive to 0 after each layer: SparK's way."""

    name = "dense-and-mask"
    note = "convolves whole channels_last images and multiplies with the mask: SparK's way"

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _DenseLayer(p, masks=True)
