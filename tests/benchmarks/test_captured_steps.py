"""Captured steps of the benchmark are its steps, on a stand-in for a graph that runs the recorded operators again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import test_step as suite
from benchmarks.measure.scales import scale_of
from benchmarks.subjects import step_ways
from benchmarks.subjects.captured_steps import WARM, GraphStep
from benchmarks.subjects.step_ways import check_equal, make_step
from benchmarks.subjects.steps import OurStep
from spatspark_fast.training import comparison, lamb

from ..training.recorded import RecordedGraphs
from .test_gate import Noted

SCALE = replace(scale_of("tiny", torch.device("cpu")), size=64, step_rounds=1)


def ours(way: str) -> OurStep:
    step = make_step(way, "test_resnet", SCALE)
    assert isinstance(step, OurStep)
    return step


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamb, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(comparison, "FAR", 0.0)


@pytest.mark.parametrize("way", ["exact", pytest.param("dense", marks=pytest.mark.rest), "sparse"])
def test_a_captured_step_is_the_step(way: str) -> None:
    eager = ours(way)
    graph = GraphStep(ours(way), RecordedGraphs())
    losses = [float(eager()) for _ in range(WARM + 3)]
    assert len(set(losses)) == len(losses)  # a new mask each time
    assert [float(graph()) for _ in range(3)] == losses[WARM:]
    assert graph.why_not is None
    assert graph.captured.replayed == WARM - 2 - 1 + 3


def test_a_way_that_trains_another_model_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    close, apart = ("exact: loss", 1e-6, 1e-4), ("light: gradient", 0.1, 1e-3)
    monkeypatch.setattr(step_ways, "_differences", lambda *_: [close, apart])
    record = Noted()
    assert list(suite.steps_of(record, ("published", "exact", "light", "light graph"), "test_resnet", SCALE)) == [
        "published",
        "exact",
    ]
    assert [(row["way"], row["reason"]) for row in record] == [
        (way, "light: gradient differs by 1.00e-01 (limit 1e-03); no figure is given")
        for way in ("light", "light graph")
    ]
    monkeypatch.setattr(step_ways, "_differences", lambda *_: [("exact: loss", float("nan"), 1e-4)])
    with pytest.raises(AssertionError, match="exact: loss differs by nan"):
        suite.steps_of(record, ("published",), "test_resnet", SCALE)


def test_what_is_not_captured_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Noted()
    assert not check_equal("test_resnet", SCALE)
    good = GraphStep(ours("exact"), RecordedGraphs())
    bad = ours("light")
    run = bad.run
    monkeypatch.setattr(bad, "run", lambda frames, *rest: run(frames, *rest) * float(frames.sum() > 0))  # asks the host
    refused = GraphStep(bad, RecordedGraphs())
    steps = {"published": make_step("published", "test_resnet", SCALE), "exact graph": good, "light graph": refused}
    suite._record_captured(record, "a case", steps, SCALE)
    rows = [(row["suite"], row["way"], row["against"]) for row in record]
    assert rows == [
        ("left_out", "light graph", ""),
        ("step", "exact graph", "published"),
        ("step_memory", "exact graph", "published"),
    ]
    assert "Training steps run kernel by kernel, without a CUDA graph" in record[0]["reason"]
