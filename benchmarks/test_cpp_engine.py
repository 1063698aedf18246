"""The C++ engine, one convolution at a time: against plain dense (oneDNN, channels_last, no mask) and ``gather``.

Batch 8, 288x288 in 9x9 patches, 60 % masked. ``limit`` is the ratio if every product with an inactive pixel were left
out and nothing else cost anything. ``new mask`` counts the row lists too, as the first layer of a stage meets them.

malloc gives memory back to the system after each freed result and faults it in again, which costs either side up to a
fifth: set ``MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000`` for steady figures.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from patchsparse import PatchGrid, available_backends, pack
from patchsparse.backends import cpp, gather, tables
from patchsparse.geometry import Window

from .timing import Timing, check_parity, in_turn

pytestmark = pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ engine was not built")

BATCH, SIDE, MASKED = 8, 9, 0.6
SIDES = ("forward", "input gradient", "weight gradient")
SHAPES = [(8, 64), (4, 128), (2, 256), (1, 512)]
DEPTHWISE = [(8, 96), (4, 192), (2, 384), (1, 768)]
Ways = dict[str, Callable[[], torch.Tensor]]


def layer(size: int, channels: int, kernel: int, groups: int, dtype: torch.dtype) -> tuple[Ways, Ways, Ways, float]:
    """Return the three sides of a convolution, plain dense, by ``cpp`` and by ``gather``, and the active-pair limit."""
    generator = torch.Generator().manual_seed(0)
    grid = PatchGrid.random(BATCH, (SIDE, SIDE), 1 - MASKED, generator=generator)
    pixels = (BATCH, channels, SIDE * size, SIDE * size)
    last = torch.channels_last
    image, grad = (torch.randn(pixels, generator=generator).to(dtype).contiguous(memory_format=last) for _ in range(2))
    weight = torch.randn(channels, channels // groups, kernel, kernel, generator=generator) / kernel
    weight = weight.to(dtype).contiguous(memory_format=last)
    pad = kernel // 2
    window = Window((kernel, kernel), (1, 1), (pad, pad))
    x, g, maps = pack(image, grid), pack(grad, grid), (grid.slot, grid.coords)

    def dense_gradient(which: int) -> torch.Tensor:
        wanted = [which == 1, which == 2, False]
        options = ([1, 1], [pad, pad], [1, 1], False, [0, 0], groups)
        return torch.ops.aten.convolution_backward(grad, image, weight, None, *options, wanted)[which - 1]

    calls = (
        lambda: F.conv2d(image, weight, None, 1, pad, 1, groups),
        lambda: dense_gradient(1),
        lambda: dense_gradient(2),
    )
    dense: Ways = dict(zip(SIDES, calls, strict=True))

    def engine(module) -> Ways:
        calls = (
            lambda: module.conv2d(x, weight, None, *maps, window, groups),
            lambda: module.conv2d_dgrad(g, weight, *maps, (size, size), window, groups),
            lambda: module.conv2d_wgrad(x, g, *maps, window, groups),
        )
        return dict(zip(SIDES, calls, strict=True))

    pairs = int((tables.tap_rows(*maps, (size, size), window) >= 0).sum())
    return dense, engine(cpp), engine(gather), BATCH * (SIDE * size * kernel) ** 2 / pairs


def both(ways: Ways) -> Callable[[], None]:
    """Run the three sides one after the other."""

    def run() -> None:
        for call in ways.values():
            call()

    return run


@torch.no_grad()
def compare(record, title: str, problem: tuple[int, int, int, int, torch.dtype]) -> Timing:
    """Check the three sides against ``gather``, then record each and all against plain dense and ``gather``."""
    dense, ours, reference, limit = layer(*problem)
    for side, call in ours.items():
        check_parity(f"{title} {side}", call(), reference[side](), 1e-4 if problem[-1] == torch.float32 else 2e-2)
    steps = {f"{name} {side}": call for name, ways in (("dense", dense), ("cpp", ours)) for side, call in ways.items()}
    steps |= {"dense all": both(dense), "cpp all": both(ours), "gather all": both(reference)}
    timing = in_turn(steps, rounds=11)
    for side in (*SIDES, "all"):
        medians = (timing.median(f"cpp {side}"), timing.median(f"dense {side}"))
        case = f"{title} {side} (limit {limit:.2f})"
        record("cpp", case, "cpp", "dense", timing.ratio(f"dense {side}", f"cpp {side}"), medians, "s")
    medians = (timing.median("cpp all"), timing.median("gather all"))
    record("cpp", f"{title} all", "cpp", "gather", timing.ratio("gather all", "cpp all"), medians, "s")
    return timing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_conv3x3(benchmark, record, size, channels, dtype):
    name = str(dtype).removeprefix("torch.")
    compare(record, f"3x3 p={size} C={channels} {name}", (size, channels, 3, 1, dtype))
    benchmark.pedantic(both(layer(size, channels, 3, 1, dtype)[1]), rounds=3)


@pytest.mark.parametrize(("size", "channels"), DEPTHWISE)
def test_depthwise7x7(benchmark, record, size, channels):
    compare(record, f"7x7 depthwise p={size} C={channels} float32", (size, channels, 7, channels, torch.float32))
    benchmark.pedantic(both(layer(size, channels, 7, channels, torch.float32)[1]), rounds=3)


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@torch.no_grad()
def test_half_precision_is_no_slower(benchmark, record, size, channels):
    ways = {str(d): both(layer(size, channels, 3, 1, d)[1]) for d in (torch.float32, torch.bfloat16)}
    timing = in_turn(ways, rounds=11)
    names = ("torch.bfloat16", "torch.float32")
    medians = (timing.median(names[0]), timing.median(names[1]))
    record(
        "cpp", f"3x3 p={size} C={channels} all", "bfloat16", "float32", timing.ratio(names[1], names[0]), medians, "s"
    )
    benchmark.pedantic(ways[names[0]], rounds=3)


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@torch.no_grad()
def test_a_new_mask(benchmark, record, size, channels):
    """The forward pass with the row lists built anew, over the same with lists that the stage has built before."""
    generator = torch.Generator().manual_seed(0)
    grid = PatchGrid.random(BATCH, (SIDE, SIDE), 1 - MASKED, generator=generator)
    x, weight = torch.randn(grid.num_active, channels, size, size), torch.randn(channels, channels, 3, 3)
    window = Window((3, 3), (1, 1), (1, 1))

    def anew() -> None:
        fresh = grid.to(torch.device("cpu"))
        cpp.conv2d(x, weight, None, fresh.slot.clone(), fresh.coords, window, 1)

    ways = {"new mask": anew, "known mask": lambda: cpp.conv2d(x, weight, None, grid.slot, grid.coords, window, 1)}
    timing = in_turn(ways, rounds=15)
    medians = (timing.median("known mask"), timing.median("new mask"))
    ratio = timing.ratio("new mask", "known mask")
    record("cpp", f"3x3 p={size} C={channels} float32 forward", "known mask", "new mask", ratio, medians, "s")
    benchmark.pedantic(anew, rounds=3)
