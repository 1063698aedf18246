"""WarpConvNet 1.8.2: the only rival with bfloat16, two dimensions and depthwise convolution."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer, missing, to_packed
from .sites import image_offsets, sites

__all__ = ["WarpConvNet", "warpconvnet_weight"]

_VOXELS = "warpconvnet.geometry.types.voxels"
_MODULES = {True: "warpconvnet.nn.modules.sparse_conv_depth", False: "warpconvnet.nn.modules.sparse_conv"}


def warpconvnet_weight(weight: Tensor, depthwise: bool) -> Tensor:
    """Return a weight as ``(taps, C_in, C_out)``, depthwise as ``(taps, C)``; taps row-major for coordinates (y, x)."""
    if depthwise:
        return weight[:, 0].permute(1, 2, 0).flatten(0, 1)
    return weight.permute(2, 3, 1, 0).flatten(0, 1)


class _WarpConvNetLayer(Layer):
    def __init__(self, p: Problem) -> None:
        s = p.shape
        self.p = p
        self.voxels = import_module(_VOXELS).Voxels
        module = import_module(_MODULES[s.depthwise])
        if s.depthwise:
            conv = module.SparseDepthwiseConv2d(s.c_in, s.k, stride=s.stride, bias=False)
        else:
            conv = module.SparseConv2d(s.c_in, s.c_out, s.k, stride=s.stride, bias=False)
        self.conv = conv.to(device=p.x.device, dtype=p.x.dtype)
        with torch.no_grad():
            self.conv.weight.copy_(warpconvnet_weight(p.weight, s.depthwise))
        self.weight = self.conv.weight

    def _voxels(self, features: Tensor, side: int):
        where = sites(self.p.grid, side)[:, 1:].contiguous()
        return self.voxels(where, features, offsets=image_offsets(self.p.grid, side))

    def build_map(self) -> None:
        """Take new voxels, which keep the map of the first forward pass; outputs in our order of rows."""
        s, rows = self.p.shape, self.p.grid.num_active
        self.given = self._voxels(self.p.x.new_empty(rows * s.p**2, s.c_in), s.p)
        self.wanted = None if s.stride == 1 else self._voxels(self.p.x.new_empty(rows * s.out_p**2, 1), s.out_p)

    def forward(self, x: Tensor) -> Tensor:
        given = self.given.replace(batched_features=x)
        y = self.conv(given) if self.wanted is None else self.conv(given, self.wanted)
        if self.given.cache is None:  # the map is found in the first forward pass
            self.given = self.given.replace(_cache=given.cache)
        return y.feature_tensor

    def packed(self, y: Tensor) -> Tensor:
        return to_packed(y, self.p.shape.out_p)

    def packed_input(self, x: Tensor) -> Tensor:
        return to_packed(x, self.p.shape.p)

    def plain_weight(self, weight: Tensor) -> Tensor:
        square = weight.unflatten(0, (self.p.shape.k, -1))
        return square.permute(2, 0, 1)[:, None] if self.p.shape.depthwise else square.permute(3, 2, 0, 1)


class WarpConvNet(Peer):
    """``SparseConv2d`` and ``SparseDepthwiseConv2d`` on ``Voxels``."""

    name = "warpconvnet"
    note = "with a stride it is given its output sites, which spares it the search for them; at most 512 images"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return why it cannot run at all, or not this shape; None if it can."""
        if shape is not None and shape.groups != 1 and not shape.depthwise:
            return "warpconvnet is compared for plain and depthwise convolution only"
        remedy = "pip install --no-build-isolation warpconvnet==1.8.2, which compiles for about ten minutes"
        depthwise = shape is not None and shape.depthwise
        return missing(_MODULES[depthwise], remedy)

    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem."""
        if p.grid.batch_size > 512:
            raise ValueError(f"warpconvnet takes at most 512 images, got {p.grid.batch_size}; use a smaller --batch")
        return _WarpConvNetLayer(p)
