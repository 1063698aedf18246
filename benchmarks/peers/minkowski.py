"""MinkowskiEngine 0.5.4: products of pairs found with a hash table; on CPU and GPU, as its users write it.

Nothing of this project's own ``minkowski`` engine takes part: its modules, its sparse tensors, its coordinate keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchsparse import PatchGrid
from patchsparse.backends.minkowski.loading import library, module

from ..subjects.convolutions import Problem, Shape
from .base import Layer, Peer, to_packed, to_rows
from .sites import rows_at, sites

__all__ = ["Minkowski", "MinkowskiResNet", "minkowski_weight"]


def minkowski_weight(weight: Tensor, depthwise: bool = False, stride: int = 1) -> Tensor:
    """Return a weight as ``(taps, C_in, C_out)``, vertical tap fastest; ``(taps, C)`` if depthwise, a matrix if 1x1."""
    if depthwise:
        return weight[:, 0].permute(2, 1, 0).flatten(0, 1)
    matrices = weight.permute(3, 2, 1, 0).flatten(0, 1)
    return matrices[0] if len(matrices) == 1 and stride == 1 else matrices


def _manager(device: torch.device) -> Any:
    kinds = module().CoordinateMapType
    return module().CoordinateManager(D=2, coordinate_map_type=kinds.CUDA if device.type == "cuda" else kinds.CPU)


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
        self.manager = _manager(self.p.x.device)
        self.key, _ = self.manager.insert_and_map(sites(self.p.grid, self.p.shape.p), [1, 1], "")

    def forward(self, x: Tensor) -> Tensor:
        given = module().SparseTensor(x, coordinate_map_key=self.key, coordinate_manager=self.manager)
        y = self.conv(given)
        self.out_key = y.coordinate_map_key
        return y.F

    def _rows(self, key: Any, side: int, stride: int) -> Tensor:
        """Return the packed row of each of its rows, which it may reorder."""
        where = self.manager.get_coordinates(key).long()
        where[:, 1:] //= stride
        return rows_at(self.p.grid, side, where).long()

    def _given(self, packed: Tensor, key: Any, side: int, stride: int) -> Tensor:
        return to_rows(packed)[self._rows(key, side, stride)]

    def _taken(self, rows: Tensor, key: Any, side: int, stride: int) -> Tensor:
        out = torch.full_like(rows, torch.nan)
        out[self._rows(key, side, stride)] = rows
        return to_packed(out, side)

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
        if shape is not None and shape.groups != 1 and not shape.depthwise:
            return "minkowski has no grouped convolution other than depthwise"
        return library().problem

    def build(self, p: Problem) -> Layer:
        return _MinkowskiLayer(p)


class MinkowskiResNet(nn.Module):
    """A timm ResNet of basic blocks in MinkowskiEngine's modules, with copies of its weights.

    ``forward`` takes the features ``(rows, C)`` of active pixels, ``begin``'s manager and key, and returns the sparse
    tensors of all levels. Max-pooling follows a ReLU, where leaving inactive pixels out or reading 0 is the same.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        blocks = [getattr(plain, f"layer{level}") for level in range(1, 5)]
        self.stem = nn.Sequential(*_conv_norm(plain.conv1, plain.bn1), module().MinkowskiReLU())
        self.pool = module().MinkowskiMaxPooling(kernel_size=3, stride=2, dimension=2)
        self.levels = nn.ModuleList(nn.Sequential(*map(_Block, level)) for level in blocks)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def begin(grid: PatchGrid, p: int) -> tuple[Any, Any]:
        """Return a new manager and the key of the sites of active patches of ``p`` pixels."""
        manager = _manager(grid.device)
        return manager, manager.insert_and_map(sites(grid, p), [1, 1], "")[0]

    def forward(self, rows: Tensor, manager: Any, key: Any) -> list[Any]:
        x = self.stem(module().SparseTensor(rows, coordinate_map_key=key, coordinate_manager=manager))
        features = [x]
        x = self.pool(x)
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


def _conv_norm(conv: Any, norm: Any) -> tuple[nn.Module, nn.Module]:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    options = {"kernel_size": kernel, "stride": stride, "dimension": 2}
    sparse = module().MinkowskiConvolution(conv.in_channels, conv.out_channels, **options)
    sparse_norm = module().MinkowskiBatchNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    with torch.no_grad():
        sparse.kernel.copy_(minkowski_weight(conv.weight, stride=stride))
    sparse_norm.bn.load_state_dict(norm.state_dict())
    return sparse, sparse_norm


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        relu = module().MinkowskiReLU
        self.first = nn.Sequential(*_conv_norm(block.conv1, block.bn1), relu())
        self.second = nn.Sequential(*_conv_norm(block.conv2, block.bn2))
        self.last = relu()
        self.shortcut = nn.Identity() if block.downsample is None else nn.Sequential(*_conv_norm(*block.downsample))

    def forward(self, x: Any) -> Any:
        return self.last(self.second(self.first(x)) + self.shortcut(x))
