"""The whole training step, from data to LAMB: ours against its rivals (`subjects/step_ways.py`), eager and compiled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
import torch

from .measure.ceilings import ceilings, optimiser_seconds
from .measure.rows import left_out
from .measure.scales import MASKED
from .measure.timing import Ratio, Timing, in_turn, said
from .measure.work import counted
from .subjects.captured_steps import GraphStep
from .subjects.step_ways import OURS, RIVALS, WAYS, case_of, check_equal, make_step
from .subjects.steps import PARTS, Step, peak, split


def steps_of(record, ways: Iterable[str], encoder: str, scale) -> dict[str, Step]:
    """Return the ways that train the same and whose step fits into memory, after one step of each.

    The others are left out, with the reason.
    """
    found, wrong = {}, check_equal(encoder, scale)
    for way in ways:
        if reason := wrong.get(way.split(" ")[0]):
            record.row(left_out(case_of(encoder, scale), way, reason, MASKED))
            continue
        try:
            with said(f"built and stepped: {way}"):
                step = make_step(way, encoder, scale)
                assert math.isfinite(float(step())), way
            found[way] = step
        except torch.OutOfMemoryError as error:
            record.row(left_out(case_of(encoder, scale), way, str(error), MASKED))
    return found


def record_steps(record, case: str, timing: Timing, bounds: Mapping[str, tuple[float | None, float]]) -> None:
    """Record ours over every rival, and the best dense step over the published one.

    Args:
        record: notes a row.
        case: encoder and sizes.
        timing: of all ways.
        bounds: of ways, how many times fewer products they have than the published step, and the floor in seconds.
    """
    rivals = [way for way in timing.seconds if way.split(" ")[0] in RIVALS]
    for way in timing.seconds:
        for rival in rivals:
            if rival != way and (way not in rivals or (way != "published" and rival == "published")):
                limit, floor = bounds.get(way, (None, None))
                details = {"masked": MASKED, "floor": floor, "limit": limit if rival == "published" else None}
                record("step", case, way, rival, *timing.compare(way, rival), **details)


def test_step(benchmark, record, scale, step_encoder):
    """Speed over both rivals; the floor is that of our convolutions and products, and of what LAMB reads and writes."""
    scale = scale.for_encoder(step_encoder)
    steps = steps_of(record, WAYS, step_encoder, scale)
    case, machine = case_of(step_encoder, scale), ceilings(scale)
    timing = in_turn(steps, rounds=scale.step_rounds, warmup=1)
    layers = {way: counted(step) for way, step in steps.items()}
    macs = {way: sum(layer.work.macs for layer in ran) for way, ran in layers.items()}
    bounds = {
        way: (
            macs["published"] / macs[way] if "published" in macs else None,
            machine.total(layers[way]) + optimiser_seconds(machine, steps[way].model),
        )
        for way in OURS
        if way in steps
    }
    record_steps(record, case, timing, bounds)
    splits = [{way: split(step) for way, step in steps.items()} for _ in range(scale.step_rounds)]
    for way in steps:
        _record_split(record, case, way, [found[way] for found in splits])
    benchmark.pedantic(lambda: None, rounds=1)


def test_compiled(benchmark, record, scale, step_encoder):
    """Compiled ways of the scale, beside those of ours as they are."""
    if not scale.compiled:
        pytest.skip("no way is compiled at this scale")
    scale = scale.for_encoder(step_encoder)
    steps = steps_of(record, [*OURS, *(f"{way} compiled" for way in scale.compiled)], step_encoder, scale)
    record_steps(record, case_of(step_encoder, scale), in_turn(steps, rounds=scale.step_rounds, warmup=1), {})
    benchmark.pedantic(lambda: None, rounds=1)


def test_graphs(benchmark, record, scale, step_encoder):
    """Captured steps, and what memory they keep, beside the published step."""
    if not scale.cuda:
        pytest.skip("CUDA graphs need a GPU")
    scale = scale.for_encoder(step_encoder)
    captured = [f"{way} graph" for way in ("dense", *OURS)]
    steps = steps_of(record, ("published", *captured), step_encoder, scale)
    _record_captured(record, case_of(step_encoder, scale), steps, scale)
    benchmark.pedantic(lambda: None, rounds=1)


def _record_captured(record, case: str, steps: dict[str, Step], scale) -> None:
    """Record steps that were captured, and their memory; those that were not are left out with the reason."""
    _leave_out_uncaptured(record, case, steps)
    record_steps(record, case, in_turn(steps, rounds=scale.step_rounds, warmup=1), {})
    if "published" not in steps:
        return
    theirs = peak(steps["published"], scale.device)
    for way, step in steps.items():
        if isinstance(step, GraphStep):
            own = step.held / 2**20
            ratio = Ratio.exact(theirs / max(own, 1e-9))
            record("step_memory", case, way, "published", ratio, (own, theirs), "MiB", masked=MASKED)


def _leave_out_uncaptured(record, case: str, steps: dict[str, Step]) -> None:
    """Drop the steps that could not be captured, and note the reason."""
    for way, step in list(steps.items()):
        if isinstance(step, GraphStep) and step.why_not is not None:
            record.row(left_out(case, way, step.why_not, MASKED))
            del steps[way]


def test_images(benchmark, record, scale):
    """Images/s of a ResNet-50 on images of three channels and 224x224 pixels: the step that SparK gives figures of."""
    if scale.images is None:
        pytest.skip("it takes minutes on a CPU")
    encoder, size, frames = scale.images
    scale = replace(scale, size=size, frames=frames)
    case, graphs = case_of(encoder, scale), ("dense graph", "exact graph") if scale.cuda else ()
    steps = steps_of(record, ("published", "dense", "exact", *graphs), encoder, scale)
    _leave_out_uncaptured(record, case, steps)
    timing = in_turn(steps, rounds=scale.step_rounds, warmup=1)
    for way in (way for way in steps if way.startswith("exact")):
        for rival in (way for way in steps if not way.startswith("exact")):
            ratio, seconds, _ = timing.compare(way, rival)
            rates = (scale.batch / seconds[0], scale.batch / seconds[1])
            record("images", case, way, rival, ratio, rates, "images/s", masked=MASKED)
    benchmark.pedantic(lambda: None, rounds=1)


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
    assert not check_equal(encoder, scale)
    theirs, own = (make_step(way, encoder, scale, torch.float32) for way in ("published", "exact"))
    for step in (theirs, own):
        step()
    timing = in_turn({"ours": own.optimizer.step, "timm": theirs.optimizer.step}, 3 * scale.step_rounds, warmup=2)
    case = f"LAMB {encoder} unet {scale.width}"
    record("step", case, "ours", "timm", *timing.compare("ours", "timm"))
    benchmark.pedantic(own.optimizer.step, rounds=1)
