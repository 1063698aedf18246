"""ocnn 2.3.3: implicit GEMM in Triton over a table of neighbours, made for octrees."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer, missing, to_packed
from .sites import neighbours

__all__ = ["Ocnn", "ocnn_weight"]

_MODULE = "ocnn.nn.octree_conv_t"


def ocnn_weight(weight: Tensor) -> Tensor:
    """Return ``(C_out, C_in, k, k)`` as ``(C_out, taps, C_in)``, taps row-major as in :func:`neighbours`."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1, weight.shape[1])


class _OcnnLayer(Layer):
    def __init__(self, p: Problem, module: Any) -> None:
        self.p = p
        self.convolve = module.octree_conv_triton
        self.weight = ocnn_weight(p.weight.detach()).contiguous().requires_grad_()

    def build_map(self) -> None:
        self.table = neighbours(self.p.grid, self.p.shape.p, self.p.shape.k).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, None, self.table)

    def packed(self, y: Tensor) -> Tensor:
        return to_packed(y, self.p.shape.p)

    def packed_input(self, x: Tensor) -> Tensor:
        return to_packed(x, self.p.shape.p)

    def plain_weight(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (self.p.shape.k, -1)).permute(0, 3, 1, 2)


class Ocnn(Peer):
    """The function behind ``ocnn.nn.OctreeConvTriton``, with a table of our own instead of an octree's."""

    name = "ocnn"
    note = "no tuned list for H100 and H200: it measures its general CUDA list; this script builds its neighbours"
    dtypes = (torch.bfloat16, torch.float16)
    graphs = True

    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return why it cannot run at all, or not this shape; None if it can."""
        if shape is not None and shape.groups != 1:
            return "ocnn has no Triton kernel for grouped or depthwise convolution"
        if shape is not None and shape.stride != 1:
            return "ocnn's Triton kernels take stride 1 only: their input gradient needs point-symmetric taps"
        os.environ.setdefault("OCNN_AUTOSAVE_AUTOTUNE", "0")  # else it writes into the home directory
        reason = missing(_MODULE, "pip install ocnn==2.3.3 filelock")
        if reason is None and not torch.cuda.is_available():
            return "ocnn's Triton kernels need a CUDA device"
        if reason is None and import_module(_MODULE).conv_fwd_implicit_gemm_splitk is None:
            return "ocnn was imported without its Triton kernels; pip install triton filelock"
        return reason

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _OcnnLayer(p, import_module(_MODULE))
