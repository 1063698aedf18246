"""The launches of convolutions with few input channels, for ``compiled.py``."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from patchsparse.backends.triton import configs, stem
from patchsparse.backends.triton import stem_configs as few
from patchsparse.backends.triton.launch import Launch, rows_like
from patchsparse.geometry import Stencil

__all__ = ["stems"]

RESNET, EFFICIENT = Stencil((7, 7), (2, 2), (3, 3)), Stencil((3, 3), (2, 2), (1, 1))
Tiles = tuple[configs.Tile, configs.Tile]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def convolution(
    c: int, stencil: Stencil, out: int, tiles: Tiles, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of a convolution of ``c`` channels to ``out``: patches of 32x32 pixels, 32 of 9x9 visible."""
    grid = (_meta(128, 9, 9, dtype=torch.int32), _meta(4096, 3, dtype=torch.int32))
    layout = stem.cells_of((32, 32), stencil, c, dtype.itemsize)
    x, weight = _meta(4096, 32, 32, c, dtype=dtype), _meta(out, c, *stencil.kernel, dtype=dtype)
    cells, taps = _meta(4096, *layout.halo, layout.cell, dtype=dtype), _meta(out, layout.total, dtype=dtype)
    y = rows_like(x, 4096, (layout.v[0], layout.h[0]), out)
    yield "stem cells", stem.cells_launch(x, cells, *grid, layout)
    yield "stem weight", stem.weight_launch(weight, taps, layout)
    yield "stem fwd", stem.forward_launch(cells, taps, _meta(out, dtype=dtype), y, layout, tiles[0])
    partial, total = stem.wgrad_launches(cells, y.permute(0, 2, 3, 1), weight, layout, tiles[1])
    yield "stem wgrad", partial
    yield "stem sum", total


def stems() -> Iterator[tuple[str, Launch]]:
    """Yield a name and a launch for every configuration, for 12 input channels, and the default for other stems."""
    forward, wgrad = few.STEM, few.STEM_WGRAD
    default = (forward[0], wgrad[0])
    yield from _named("C12", convolution(12, RESNET, 64, default))
    for tile in forward[1:]:
        launches = convolution(12, RESNET, 64, (tile, wgrad[0]))
        yield from _named(f"C12 {tile.m}x{tile.n}x{tile.k}", launches, "stem fwd")
    for tile in wgrad[1:]:
        launches = convolution(12, RESNET, 64, (forward[0], tile))
        yield from _named(f"C12 {tile.m}x{tile.n}x{tile.k}", launches, "stem wgrad")
    yield from _named("C1", convolution(1, RESNET, 64, default))
    small = (few.stem_tiles(32, 64, 2, True)[0], few.stem_wgrad_tiles(64, 2, True)[0])
    yield from _named("C3", convolution(3, EFFICIENT, 32, small, torch.float16))
    halved = (replace(forward[0], k=32), replace(wgrad[0], k=32))
    yield from _named("C5 tf32", convolution(5, EFFICIENT, 64, halved, torch.float32))
    for name, launch in _named(
        "C12 ieee", convolution(12, RESNET, 64, (configs.FULL[0], configs.FULL[0]), torch.float32)
    ):
        precise = {"PRECISION": "ieee"} if "PRECISION" in launch.constants else {}
        yield name, replace(launch, constants=launch.constants | precise)


def _named(suffix: str, launches: Iterator[tuple[str, Launch]], only: str = "") -> Iterator[tuple[str, Launch]]:
    return ((f"{name} {suffix}", launch) for name, launch in launches if only in name)
