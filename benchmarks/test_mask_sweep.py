"""Speed over plain dense against the masked share: two layers and a whole encoder, with their limits.

``limit`` is the ratio of products, all over those of active pairs; ``floor`` the least time by the measured roofline.
Both are those of direct convolution.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .convolutions import SIDES, Shape, operators, problem, reference
from .encoders import DENSE, encoders
from .roofline import ceilings, conv_work
from .timing import check_parity, in_turn

SHAPES = (Shape(8, 64, 64), Shape(1, 512, 512))
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def test_encoder_sweep(benchmark, record, scale):
    scale = replace(scale, batch=max(2, scale.batch // 2))
    name = scale.encoders[0]
    for masked in scale.sweep:
        ways = encoders(name, ("auto",), masked, scale)
        ways.check()
        limit, floor = ways.bounds("auto")
        timing = in_turn({way: ways.steps[way] for way in ("auto", DENSE)}, scale.sweep_rounds, warmup=1)
        values = timing.medians("auto", DENSE)
        details = {"masked": masked, "limit": limit, "floor": floor}
        record("mask_sweep", ways.case, "auto", DENSE, timing.ratio(DENSE, "auto"), values, "s", **details)
    benchmark.pedantic(ways.steps["auto"], rounds=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_layer_sweep(benchmark, record, scale, shape):
    for masked in scale.sweep:
        side = (scale.layer_side,) * 2
        p = problem(shape, masked, scale.layer_batch, scale.precision, scale.device.type, side)
        ours, dense = operators(p, "auto"), operators(p, "dense")
        with torch.enable_grad():
            expected = reference(p)
        for kind, key in zip(SIDES, ("y", "x", "w"), strict=True):
            check_parity(f"{p.shape} {kind}", ours[kind]()[0], expected[key], LIMITS[scale.precision])
        ways = {f"{name} {k}": run for name, runs in (("ours", ours), ("dense", dense)) for k, run in runs.items()}
        timing = in_turn(ways, scale.sweep_rounds, warmup=1)
        for way in ("ours", "dense"):
            timing = timing.summed(way, [f"{way} {kind}" for kind in SIDES])
        floor = ceilings(scale.device.type).floor(conv_work(p), scale.precision)
        details = {"masked": masked, "limit": p.limit, "floor": floor}
        values, ratio = timing.medians("ours", "dense"), timing.ratio("dense", "ours")
        record("mask_sweep", f"{p.shape} batch {scale.layer_batch}", "auto", DENSE, ratio, values, "s", **details)
    benchmark.pedantic(ours["fwd"], rounds=1)
