"""The whole training step, from data to LAMB: ours against two rivals (`subjects/step_ways.py`)."""

from __future__ import annotations

import math
import statistics

import torch

from .measure.ceilings import ceilings, optimiser_seconds
from .measure.scales import MASKED
from .measure.timing import Ratio, in_turn
from .measure.work import counted
from .subjects.step_ways import OURS, RIVALS, WAYS, case_of, check_equal, make_step
from .subjects.steps import PARTS, split


def test_step(benchmark, record, scale, step_encoder):
    """Speed over both rivals; the floor is that of our convolutions and products, and of what LAMB reads and writes."""
    scale = scale.for_encoder(step_encoder)
    check_equal(step_encoder, scale)
    steps = {way: make_step(way, step_encoder, scale) for way in WAYS}
    for way, step in steps.items():
        assert math.isfinite(float(step())), way
    timing = in_turn(steps, rounds=scale.step_rounds, warmup=1)
    case, machine = case_of(step_encoder, scale), ceilings(scale)
    layers = {way: counted(step) for way, step in steps.items() if way not in scale.compiled}
    macs = {way: sum(layer.work.macs for layer in ran) for way, ran in layers.items()}
    for way in OURS:
        floor = limit = None
        if way in layers:
            floor = machine.total(layers[way]) + optimiser_seconds(machine, steps[way].model)
            limit = macs["published"] / macs[way]
        for rival in RIVALS:
            details = {"masked": MASKED, "floor": floor, "limit": limit if rival == "published" else None}
            record("step", case, way, rival, *timing.compare(way, rival), **details)
    record("step", case, "dense", "published", *timing.compare("dense", "published"), masked=MASKED)
    splits = [{way: split(step) for way, step in steps.items()} for _ in range(scale.step_rounds)]
    for way in steps:
        _record_split(record, case, way, [found[way] for found in splits])
    benchmark.pedantic(steps["exact"], rounds=1)


def _record_split(record, case: str, way: str, found: list[dict[str, float]]) -> None:
    """Record the seconds of each part of a step beside their sum; its ratio is the part's share."""
    median = {part: statistics.median(parts[part] for parts in found) for part in PARTS}
    whole = sum(median.values())
    for part in PARTS:
        shares = sorted(parts[part] / sum(parts.values()) for parts in found)
        share = Ratio(statistics.median(shares), shares[0], shares[-1])
        record("split", f"{case} {part}", way, "whole step", share, (median[part], whole), "s", masked=MASKED)


def test_optimizer(benchmark, record, scale):
    """LAMB on the parameters of the first encoder with the U-Net, against timm's."""
    encoder = scale.step_encoders[0]
    check_equal(encoder, scale)
    theirs, own = (make_step(way, encoder, scale, torch.float32) for way in ("published", "exact"))
    for step in (theirs, own):
        step()
    timing = in_turn({"ours": own.optimizer.step, "timm": theirs.optimizer.step}, 3 * scale.step_rounds, warmup=2)
    case = f"LAMB {encoder} unet {scale.width}"
    record("step", case, "ours", "timm", *timing.compare("ours", "timm"))
    benchmark.pedantic(own.optimizer.step, rounds=1)
