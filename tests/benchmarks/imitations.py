"""Stand-ins for libraries that need a GPU: their interfaces and conventions in plain PyTorch, by look-up.

They follow the libraries' own words: the weight of spconv and spconv-triton is ``(C_out, k, k, C_in)``, a stride
writes every site that an input reaches, in any order; ocnn multiplies ``weight[:, v]`` with the row in column v of the
table; WarpConvNet's ``weight[v]`` belongs to the v-th offset with the last coordinate fastest, centred, and its map is
kept with the voxels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import product
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn


class Maps:
    """Count how often pairs are looked up."""

    def __init__(self) -> None:
        self.built = 0

    def table(self, given: Tensor, wanted: Tensor, kernel: int, stride: int) -> Tensor:
        """Return ``(M, taps)``: the row of ``given`` that each tap of each ``wanted`` site reads, or -1."""
        self.built += 1
        row_of = {tuple(site): row for row, site in enumerate(given.tolist())}
        taps = list(product(range(-(kernel // 2), kernel // 2 + 1), repeat=2))
        rows = [
            [row_of.get((image, y * stride + dy, x * stride + dx), -1) for dy, dx in taps]
            for image, y, x in wanted.tolist()
        ]
        return torch.tensor(rows).reshape(len(rows), len(taps))


def _gathered(x: Tensor, table: Tensor) -> Tensor:
    """Return ``(M, taps, C)``, 0 where the table has -1."""
    return torch.where((table >= 0)[..., None], x[table.clamp_min(0)], 0)


def _ocnn(_: Maps) -> dict[str, ModuleType]:
    module = ModuleType("ocnn.nn.octree_conv_t")

    def convolve(x: Tensor, weight: Tensor, bias: None, table: Tensor) -> Tensor:
        return torch.einsum("mvi,ovi->mo", _gathered(x, table.long()), weight)

    module.__dict__["octree_conv_triton"] = convolve
    return {"ocnn.nn.octree_conv_t": module}


def _spconv(maps: Maps, path: str = "spconv.pytorch") -> dict[str, ModuleType]:
    module = ModuleType(path)

    def sparse_tensor(features, indices, spatial_shape, batch_size, indice_dict):
        assert indices.dtype == torch.int32
        return SimpleNamespace(
            features=features, indices=indices, size=spatial_shape, batch=batch_size, indice_dict=indice_dict
        )

    class Convolution(nn.Module):
        def __init__(self, c_in, c_out, kernel, stride=1, padding=0, bias=True, indice_key=None, **_):
            super().__init__()
            self.kernel, self.stride, self.key = kernel, stride, indice_key
            assert not bias
            assert stride == 1 or padding == kernel // 2
            self.weight = nn.Parameter(torch.zeros(c_out, kernel, kernel, c_in))

        def forward(self, given):
            wanted, pairs = given.indices, dict(given.indice_dict)
            if self.stride > 1:
                wanted = self.reached(given)
            table = pairs.get(self.key)
            if table is None:
                table = maps.table(given.indices, wanted, self.kernel, self.stride)
            if self.key is not None:
                pairs[self.key] = table
            y = torch.einsum("mvi,ovi->mo", _gathered(given.features, table), self.weight.flatten(1, 2))
            return SimpleNamespace(features=y, indices=wanted, indice_dict=pairs)

        def reached(self, given) -> Tensor:
            height, width = (side // self.stride for side in given.size)
            every = torch.tensor(list(product(range(given.batch), range(height), range(width))), dtype=torch.int32)
            hit = (maps.table(given.indices, every, self.kernel, self.stride) >= 0).any(1)
            return every[hit].flip(0)

    for name, value in {
        "SparseConvTensor": sparse_tensor,
        "SubMConv2d": Convolution,
        "SparseConv2d": Convolution,
    }.items():
        module.__dict__[name] = value
    return {path: module}


class Voxels:
    """Coordinates (y, x) of all images, where each image begins, features, and the map that was found."""

    def __init__(self, coordinates: Tensor, features: Tensor, offsets: Tensor, _cache: Tensor | None = None) -> None:
        assert offsets.device.type == "cpu"
        assert int(offsets[-1]) == len(coordinates) == len(features)
        image = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        self.sites = torch.cat((image[:, None], coordinates), 1)
        self.coordinates, self.offsets, self.feature_tensor, self.cache = coordinates, offsets, features, _cache

    def replace(self, batched_features: Tensor | None = None, _cache: Tensor | None = None) -> Voxels:
        features = self.feature_tensor if batched_features is None else batched_features
        return Voxels(self.coordinates, features, self.offsets, self.cache if _cache is None else _cache)


def _warpconvnet(maps: Maps) -> dict[str, ModuleType]:
    class Convolution(nn.Module):
        def __init__(self, equation: str, kernel: int, stride: int, *channels: int) -> None:
            super().__init__()
            self.equation, self.kernel, self.stride = equation, kernel, stride
            self.weight = nn.Parameter(torch.zeros(kernel**2, *channels))

        def forward(self, given: Voxels, wanted: Voxels | None = None) -> Voxels:
            target = given if wanted is None else wanted
            if given.cache is None:
                given.cache = maps.table(given.sites, target.sites, self.kernel, self.stride)
            y = torch.einsum(self.equation, _gathered(given.feature_tensor, given.cache), self.weight)
            return target.replace(batched_features=y)

    def plain(c_in, c_out, kernel, stride=1, bias=True):
        return Convolution("mvi,vio->mo", kernel, stride, c_in, c_out)

    def depthwise(channels, kernel, stride=1, bias=True):
        return Convolution("mvi,vi->mi", kernel, stride, channels)

    found = {}
    for name, content in {
        "warpconvnet.geometry.types.voxels": {"Voxels": Voxels},
        "warpconvnet.nn.modules.sparse_conv": {"SparseConv2d": plain},
        "warpconvnet.nn.modules.sparse_conv_depth": {"SparseDepthwiseConv2d": depthwise},
    }.items():
        found[name] = ModuleType(name)
        found[name].__dict__.update(content)
    return found


BUILDERS: dict[str, Callable[[Maps], dict[str, ModuleType]]] = {
    "ocnn": _ocnn,
    "spconv": _spconv,
    "spconv-triton": partial(_spconv, path="spconv_triton.pytorch"),
    "warpconvnet": _warpconvnet,
}


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> Maps:
    """Put a stand-in where ``import`` finds it; return the count of its look-ups."""
    maps = Maps()
    modules = BUILDERS[name](maps)
    parents = {".".join(full.split(".")[:i]) for full in modules for i in range(1, full.count(".") + 1)}
    for full in sorted(parents):
        modules.setdefault(full, ModuleType(full))
    for full, module in modules.items():
        module.__spec__ = ModuleSpec(full, None, is_package=full in parents)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, full, module)
    return maps
