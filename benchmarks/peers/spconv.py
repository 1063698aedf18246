"""spconv 2.3.8, implicit GEMM in CUDA over pairs found with a hash table, and spconv-triton 1.0.0, the same in Triton.

The second has the interface of the first, also in two dimensions, so that one adapter serves both.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer, missing, to_packed, to_rows
from .sites import rows_at, sites

__all__ = ["Spconv", "SpconvTriton", "spconv_weight"]


def spconv_weight(weight: Tensor) -> Tensor:
    """Return ``(C_out, C_in, k, k)`` as spconv's ``(C_out, k, k, C_in)``, for coordinates (image, y, x)."""
    return weight.permute(0, 2, 3, 1)


class _SpconvLayer(Layer):
    """A submanifold convolution, or with a stride a general one, which also writes sites outside of active patches."""

    def __init__(self, p: Problem, module: Any) -> None:
        s = p.shape
        self.p, self.tensor = p, module.SparseConvTensor
        self.reuses_map = s.stride == 1
        if self.reuses_map:
            options = {"bias": False, "indice_key": "map", "large_kernel_fast_algo": s.k > 3}
            conv = module.SubMConv2d(s.c_in, s.c_out, s.k, **options)
        else:
            conv = module.SparseConv2d(s.c_in, s.c_out, s.k, stride=s.stride, padding=s.k // 2, bias=False)
        self.conv = conv.to(device=p.x.device, dtype=p.x.dtype)
        with torch.no_grad():
            self.conv.weight.copy_(spconv_weight(p.weight))
        self.weight = self.conv.weight
        self.size = [side * s.p for side in p.grid.shape]
        self.kept: dict[str, Any] = {}

    def build_map(self) -> None:
        """Forget the pairs; spconv finds them in its next forward pass."""
        self.indices = sites(self.p.grid, self.p.shape.p)
        self.kept = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.tensor(x, self.indices, self.size, self.p.grid.batch_size, indice_dict=dict(self.kept)))
        if self.reuses_map:
            self.kept = y.indice_dict
        self.out_indices = y.indices
        return y.features

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Return which of spconv's outputs lie in active patches, and their packed rows."""
        rows = rows_at(self.p.grid, self.p.shape.out_p, self.out_indices)
        return rows >= 0, rows[rows >= 0].long()

    def direction(self, packed: Tensor) -> Tensor:
        if not hasattr(self, "out_indices"):
            with torch.no_grad():
                self.forward(self.operand(self.p.x))
        inside, rows = self._rows()
        g = packed.new_zeros(len(inside), packed.shape[1])
        g[inside] = to_rows(packed)[rows]
        return g

    def packed(self, y: Tensor) -> Tensor:
        inside, rows = self._rows()
        out = y.new_full((self.p.grid.num_active * self.p.shape.out_p**2, y.shape[1]), torch.nan)
        out[rows] = y[inside]
        return to_packed(out, self.p.shape.out_p)

    def packed_input(self, x: Tensor) -> Tensor:
        return to_packed(x, self.p.shape.p)

    def plain_weight(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 3, 1, 2)


class Spconv(Peer):
    """``SubMConv2d``, or ``SparseConv2d`` with a stride."""

    name = "spconv"
    note = (
        "float16: it has no bfloat16 kernels, and under bfloat16 autocast silently runs float16; both gradients at "
        "once; with a stride it always builds its map and also writes sites outside of active patches"
    )
    dtypes = (torch.float16, torch.float32)
    parts = False
    module = "spconv.pytorch"
    remedy = "pip install spconv-cu126==2.3.8 'cumm-cu126<0.8'"

    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return why it cannot run at all, or not this shape; None if it can."""
        if shape is not None and shape.groups != 1:
            return f"{self.name} has no grouped or depthwise convolution"
        reason = missing(self.module, self.remedy)
        if reason is None and not torch.cuda.is_available():
            return f"{self.name} needs a CUDA device"
        return reason

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        return _SpconvLayer(p, import_module(self.module))


class SpconvTriton(Spconv):
    """The same modules of spconv-triton, which follows spconv's interface, weights and types."""

    name = "spconv-triton"
    note = (
        "float16, as spconv, whose types it documents; sums in float32; it measures its tiles at the first call; both "
        "gradients at once; with a stride it always builds its map and also writes sites outside of active patches"
    )
    module = "spconv_triton.pytorch"
    remedy = "pip install spconv-triton==1.0.0"
