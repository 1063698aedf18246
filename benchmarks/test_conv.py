"""Single convolutions on a CPU: forward, input gradient, weight gradient and their sum, against plain dense.

Plain dense is oneDNN on whole channels_last images; it gets its masking for free. ``limit`` is the ratio if every
product with an inactive pixel were left out of direct convolution and nothing else cost anything. 60 % masked.

malloc on Linux gives memory back after each freed result and faults it in again, which costs either side up to a fifth:
set ``MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000`` for steady figures.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse.geometry import Stencil
from patchsparse.pointwise import local_conv2d
from patchsparse.processor import lacks

from .measure.ceilings import ceilings
from .measure.device import device
from .measure.scales import MASKED
from .measure.timing import check_parity, in_turn
from .peers import Packed, peers
from .peers.contenders import Case, contenders, peer_rows
from .subjects.convolutions import GROUPS, LIMITS, RESULTS, SIDES, Shape, fresh, operators, problem, reference
from .subjects.encoders import DENSE

POINTWISE = ((8, 64, 256), (4, 512, 128), (2, 256, 1024), (1, 512, 2048))

pytestmark = pytest.mark.skipif(
    device().type == "cuda", reason="on a GPU layers are replayed as CUDA graphs: python -m benchmarks.gpu.kernels"
)


def _runnable(rivals: tuple[str, ...], dtype: torch.dtype) -> tuple[str, ...]:
    """Leave out plain dense where the processor lacks a half: PyTorch's fallback is 15 to 200 times as slow as ours."""
    return tuple(rival for rival in rivals if rival != DENSE or not lacks(dtype))


def layer_rows(record, shape: Shape, dtypes: tuple[torch.dtype, ...], scale) -> Callable[[], object]:
    """Record all sides of a layer in some types, after their results were compared; return our forward pass."""
    rivals = (DENSE, "auto", "gather")
    ways, problems = {}, {}
    for dtype in dtypes:
        p = problems[dtype] = problem(shape, MASKED, scale.layer_batch, dtype, "cpu", (scale.layer_side,) * 2)
        expected = reference(p)
        for engine in _runnable(rivals, dtype):
            for side, run in operators(p, engine).items():
                if engine != DENSE:
                    check_parity(f"{engine} {shape} {dtype} {side}", run()[0], expected[RESULTS[side]], LIMITS[dtype])
                ways[f"{engine} {dtype} {side}"] = run
    with torch.no_grad():
        timing = in_turn(ways, scale.layer_rounds, warmup=1)
    for dtype, p in problems.items():
        named = f"{shape} {str(dtype).removeprefix('torch.')}"
        for engine in _runnable(rivals, dtype):
            timing = timing.summed(f"{engine} {dtype} all", [f"{engine} {dtype} {side}" for side in SIDES])
        for side in (*SIDES, "all"):
            passes = SIDES if side == "all" else (side,)
            floor = ceilings(scale).floor(p.work(passes), dtype) * 1e3
            for rival in _runnable((DENSE, *(("gather",) if side == "all" else ())), dtype):
                compared = timing.compare(f"auto {dtype} {side}", f"{rival} {dtype} {side}", "ms")
                limit = p.limit if rival == DENSE else None
                details = {"masked": MASKED, "limit": limit, "floor": floor}
                record("conv", f"{named} {side}", "auto", rival, *compared, **details)
    if len(problems) == 2:
        compared = timing.compare(f"auto {dtypes[1]} all", f"auto {dtypes[0]} all", "ms")
        record("conv", f"{shape} all", "bfloat16", "float32", *compared, masked=MASKED)
    return ways[f"auto {dtypes[0]} fwd"]


@pytest.mark.parametrize("shape", GROUPS["3x3"], ids=str)
def test_conv3x3(benchmark, record, scale, shape):
    """3x3 layers of all stages of a ResNet-18, in float32 and bfloat16."""
    benchmark.pedantic(layer_rows(record, shape, (torch.float32, torch.bfloat16), scale), rounds=1)


@pytest.mark.parametrize("shape", [*GROUPS["depthwise"], GROUPS["stride2"][0], *GROUPS["stem"]], ids=str)
def test_other_stencils(benchmark, record, scale, shape):
    """7x7 depthwise of a ConvNeXt, a stride of 2, the stem of a ResNet."""
    benchmark.pedantic(layer_rows(record, shape, (torch.float32,), scale), rounds=1)


@pytest.mark.parametrize("shape", [GROUPS["3x3"][0], GROUPS["3x3"][3]], ids=str)
def test_peers(benchmark, record, scale, shape):
    """Libraries that are installed and can run here, called as their users call them; with and without their maps."""
    side = (scale.layer_side,) * 2
    p = problem(shape, MASKED, scale.layer_batch, torch.float32, "cpu", side)
    case = Case(p, MASKED, scale.layer_rounds)
    others = tuple(peer for peer in peers() if peer.name != DENSE)
    for row in peer_rows(case, contenders(case, Packed("auto", "cpu"), others, set()), ("fwd", "step", "step + map")):
        record.row(row)
    benchmark.pedantic(operators(p, "auto")["fwd"], rounds=1)


@pytest.mark.parametrize(("size", "inputs", "outputs"), POINTWISE)
def test_pointwise(benchmark, record, scale, size, inputs, outputs):
    """1x1 convolutions, half of a ResNet-50's products: one product of all rows against ``F.conv2d``; both packed."""
    generator = torch.Generator().manual_seed(0)
    patches = scale.layer_batch * 16

    def packed(channels: int) -> Tensor:
        values = torch.randn(patches, channels, size, size, generator=generator)
        return values.contiguous(memory_format=torch.channels_last)

    weight = (torch.randn(outputs, inputs, 1, 1, generator=generator) / inputs**0.5).requires_grad_()
    x, grad = packed(inputs).requires_grad_(), packed(outputs)

    def step(convolve: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            y = convolve(x, weight)
            return [y, *torch.autograd.grad(y, (x, weight), grad)]

        return run

    ways = {"product": step(lambda a, w: local_conv2d(a, w, None, Stencil((1, 1)), 1)), "conv2d": step(F.conv2d)}
    for ours, theirs in zip(ways["product"](), ways["conv2d"](), strict=True):
        check_parity("1x1", ours, theirs, 1e-5)
    timing = in_turn(ways, scale.layer_rounds, warmup=1)
    case = f"1x1 p{size} C{inputs}-{outputs} float32 step"
    record("conv", case, "product", "conv2d", *timing.compare("product", "conv2d", "ms"))
    benchmark.pedantic(ways["product"], rounds=1)


@pytest.mark.parametrize("shape", [GROUPS["3x3"][0], GROUPS["3x3"][3]], ids=str)
@torch.no_grad()
def test_a_new_mask(benchmark, record, scale, shape):
    """The forward pass with the row lists built anew, over the same with lists that the stage has built before."""
    p = problem(shape, MASKED, scale.layer_batch, torch.float32, "cpu", (scale.layer_side,) * 2)

    def anew() -> list[Tensor]:
        return operators(p._replace(grid=fresh(p.grid)), "auto")["fwd"]()

    ways = {"known mask": operators(p, "auto")["fwd"], "new mask": anew}
    with torch.enable_grad():
        expected = reference(p)["y"]
    for name, run in ways.items():
        check_parity(f"{shape} {name}", run()[0], expected, 1e-4)
    timing = in_turn(ways, 2 * scale.layer_rounds)
    compared = timing.compare("known mask", "new mask", "ms")
    record("conv", f"{shape} float32 fwd", "known mask", "new mask", *compared, masked=MASKED)
    benchmark.pedantic(anew, rounds=1)
