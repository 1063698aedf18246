"""Speed over plain dense against the masked share: two layers and a whole encoder, with their limits.

``limit`` is the ratio of products, all over those of active pairs; ``floor`` the least time by the measured roofline.
Both are those of direct convolution.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .measure.ceilings import ceilings
from .measure.timing import check_parity, in_turn
from .subjects.convolutions import LIMITS, RESULTS, SIDES, Shape, operators, problem, reference
from .subjects.encoders import DENSE, encoders

SHAPES = (Shape(8, 64, 64), Shape(1, 512, 512))


def test_encoder_sweep(benchmark, record, scale, swept):
    """The first encoder, at half the batch."""
    scale = replace(scale, batch=max(2, scale.batch // 2))
    ways = encoders(scale.encoders[0], ("auto",), swept, scale)
    ways.check()
    limit, floor = ways.bounds("auto")
    timing = in_turn({way: ways.steps[way] for way in ("auto", DENSE)}, scale.sweep_rounds, warmup=1)
    details = {"masked": swept, "limit": limit, "floor": floor}
    record("mask_sweep", ways.case, "auto", DENSE, *timing.compare("auto", DENSE), **details)
    benchmark.pedantic(ways.steps["auto"], rounds=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_layer_sweep(benchmark, record, scale, shape, swept):
    """One layer, forward and both gradients."""
    p = problem(shape, swept, scale.layer_batch, scale.precision, scale.device.type, (scale.layer_side,) * 2)
    runs = {"auto": operators(p, "auto"), DENSE: operators(p, "dense")}
    with torch.enable_grad():
        expected = reference(p)
    for side, run in runs["auto"].items():
        check_parity(f"{shape} {side}", run()[0], expected[RESULTS[side]], LIMITS[scale.precision])
    timing = in_turn({f"{way} {s}": runs[way][s] for way in runs for s in SIDES}, scale.sweep_rounds, warmup=1)
    for way in runs:
        timing = timing.summed(way, [f"{way} {side}" for side in SIDES])
    floor = ceilings(scale).floor(p.work(), scale.precision)
    details = {"masked": swept, "limit": p.limit, "floor": floor}
    case = f"{shape} batch {scale.layer_batch}"
    record("mask_sweep", case, "auto", DENSE, *timing.compare("auto", DENSE), **details)
    benchmark.pedantic(runs["auto"]["fwd"], rounds=1)
