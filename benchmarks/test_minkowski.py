"""MinkowskiEngine on torch's own BLAS: layers and a whole ResNet-18, forward + backward, against our automatic choice.

Batch 8, 288x288 in 9x9 patches, 60 % masked, float32. ``+ map`` rows meet a new mask in every pass, as training does:
MinkowskiEngine finds its coordinates and pairs again, and ours builds its row lists again. The others meet a mask that
both have met before. Outputs and gradients of all are compared with dense-and-mask first.
"""

from __future__ import annotations

import pytest
import torch

from .measure.device import has_gpu
from .measure.scales import MASKED
from .measure.timing import in_turn
from .peers import Minkowski, Packed
from .peers.contenders import Case, contenders, peer_rows
from .peers.minkowski_resnet import ResNets
from .subjects.convolutions import GROUPS, operators, problem

MISSING = Minkowski().why_not()

pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(has_gpu(), reason="on a GPU: python -m benchmarks.gpu.kernels"),
]


@pytest.mark.parametrize("shape", [*GROUPS["3x3"], *GROUPS["depthwise"]], ids=str)
def test_layers(benchmark, record, scale, shape):
    """Single layers, as their users call them; with and without the search for pairs."""
    p = problem(shape, MASKED, scale.layer_batch, torch.float32, "cpu", (scale.layer_side,) * 2)
    case = Case(p, MASKED, min(5, scale.layer_rounds) if shape.depthwise else scale.layer_rounds)
    found = contenders(case, Packed("auto", "cpu"), (Minkowski(),), set())
    if len(found) != 2:
        raise AssertionError(f"MinkowskiEngine did not run {shape} rightly; see the line above")
    for row in peer_rows(case, found, ("fwd", "step", "step + map")):
        record.row(row | {"suite": "minkowski"})
    benchmark.pedantic(operators(p, "auto")["fwd"], rounds=1)


def test_encoder(benchmark, record, scale):
    """A whole ResNet-18, on a mask that was met before and on a new one."""
    ways = ResNets(scale)
    ways.check()
    steps = ways.steps()
    timing = in_turn(steps, max(scale.rounds, min(5, scale.layer_rounds)), warmup=1)
    for kind in ("step", "step + map"):
        case = f"resnet18 batch {scale.layer_batch} {kind}"
        compared = timing.compare(f"auto {kind}", f"minkowski {kind}")
        record("minkowski", case, "auto fp32", "minkowski fp32", *compared, masked=MASKED)
    benchmark.pedantic(steps["auto step"], rounds=1)
