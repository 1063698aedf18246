"""Checks and timings of kernels on a machine without a GPU: refusals, the order of cases, tables, rows of peers.

Where something stands for the GPU, ``gather`` stands for the Triton engine, and a captured run is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, graphs
from benchmarks.gpu import densify as gpu_densify
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.measure.rows import COLUMNS, read
from benchmarks.peers import Dense, DenseAndMask, Layer, Packed, Spconv, base
from benchmarks.peers.contenders import Case, contenders, peak_rows, peer_rows
from benchmarks.peers.dense import _DenseLayer
from benchmarks.subjects.convolutions import GROUPS, Problem, Shape, problem
from patchsparse import unpack

ROOT = Path(__file__).parents[2]
COMMAND = "python -m benchmarks.gpu.kernels"
SMALL = Shape(2, 8, 8)


def small_case(calls: int = 1) -> Case:
    return Case(problem(SMALL, 0.6, 2, torch.bfloat16, "cpu", (3, 3)), 0.6, rounds=2, calls=calls)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a captured run be run again, and ``gather`` be the Triton engine."""
    operators = graphs.operators
    monkeypatch.setattr(graphs, "capture", lambda run: (run, run()))
    monkeypatch.setattr(checks, "capture", lambda run: (run, run()))
    monkeypatch.setattr(graphs, "operators", lambda p, name: operators(p, "gather" if name == "triton" else name))


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    """From another directory, and from a checkout that is not installed."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu.kernels"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stdout == ""
    assert (
        run.stderr
        == "python -m benchmarks.gpu.kernels needs a CUDA device; on a CPU run pytest tests/kernels/test_triton.py\n"
    )


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_kernels, "has_gpu", lambda: True)
    monkeypatch.setattr(Packed, "why_not", lambda *_: "Triton is not installed")
    assert gpu_kernels.main([]) == 2
    assert capsys.readouterr().err == f"{COMMAND} cannot run the triton engine: Triton is not installed\n"


def test_the_first_masked_share_is_timed_for_all_shapes_first() -> None:
    order = list(gpu_kernels.cases(["3x3", "stride2", "densify", "peers"], [0.6, 0.3]))
    assert [asked.masked for asked in order] == [0.6] * 13 + [0.3] * 13
    assert [asked.what[1] for asked in order[:4]] == [64, 128, 256, 512]
    assert [asked.name for asked in order[11:13]] == [
        "3x3 s1 p8 C64-64 g1 and peers masked 0.60",
        "3x3 s1 p1 C512-512 g1 and peers masked 0.60",
    ]
    every = [shape for group in GROUPS.values() for shape in group]
    assert all(32 % s.p == 0 and s.p % s.stride == 0 for s in every)  # stages of a network on patches of 32


class Wrong(Dense):
    """Give an output that is 10 % too large."""

    name = "wrong"

    def build(self, p: Problem) -> Layer:
        class Larger(_DenseLayer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * 1.1

        return Larger(p)


class Broken(Dense):
    """Fail as a library may."""

    name = "broken"

    def build(self, p: Problem) -> Layer:
        raise RuntimeError("no kernel image is available")


def test_peers_are_timed_only_if_they_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda _: None)
    case = small_case()
    told: set[str] = set()
    given = (case, Packed("gather", "cpu"), (DenseAndMask(), Wrong(), Broken(), Spconv()), told)
    contenders(*given)
    found = contenders(*given)
    assert [c.label for c in found] == ["gather bf16", "dense-and-mask bf16"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(said) == 3  # each once
    assert "wrong bf16 3x3 s1 p2 C8-8 g1 deviates from dense-and-mask by" in said[0]
    assert said[1] == "left out  broken bf16 3x3 s1 p2 C8-8 g1 failed: RuntimeError: no kernel image is available"
    assert "spconv is not installed" in said[2]
    rows = peer_rows(case, found)
    passes = ("fwd", "dgrad", "wgrad", "bwd", "step")  # it has no map
    assert [row["case"] for row in rows] == [f"{case.p.shape} bfloat16 {kind} eager" for kind in passes]
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["way"], row["against"], row["unit"]) == ("gather bf16", "dense-and-mask bf16", "ms")
        assert min(float(row[name]) for name in ("ratio", "value", "against_value")) > 0
        assert (row["masked"], row["suite"]) == ("0.6", "conv")
        assert 0 < float(row["parity"]) < 2e-2


@pytest.mark.usefixtures("replayed")
def test_densifying_is_compared_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(gpu_densify.densify_rows((2, 8), 0.6, 1, 2, "cpu"))
    assert [row["case"] for row in rows] == [f"norm + unpack p2 C8 {kind}" for kind in ("fwd", "step")]
    assert all(tuple(row) == COLUMNS and row["against"] == "batch_norm, unpack" for row in rows)
    monkeypatch.setattr(gpu_densify, "unpack", lambda packed, grid, fill: unpack(packed, grid, fill + 1))
    with pytest.raises(AssertionError, match="norm \\+ unpack y p2 C8 differs by"):
        list(gpu_densify.densify_rows((2, 8), 0.6, 1, 2, "cpu"))


@pytest.mark.usefixtures("replayed")
def test_layers_are_compared_before_their_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = graphs.operators

    def wrong(p: Problem, name: str):
        found = operators(p, name)
        return {side: lambda run=run: [run()[0] * 1.1] for side, run in found.items()} if name == "triton" else found

    case = small_case(calls=3)
    rows = list(graphs.graph_rows(case))
    layers = [(row["case"].split()[-1], row["way"], row["against"]) for row in rows]
    assert layers == [(side, way, "dense") for side in ("fwd", "dgrad", "wgrad", "all") for way in ("gather", "triton")]
    assert all(float(row["limit"]) > 1 for row in rows)
    sums = [float(row["value"]) for row in rows if row["way"] == "triton"]
    assert sums[3] == pytest.approx(sum(sums[:3]), rel=0.5)  # medians of rounds, not of sums
    found = contenders(case, Packed("gather", "cpu"), (DenseAndMask(),), set())
    others = [*graphs.peer_graph_rows(case, found), *peak_rows(case, found)]
    kinds = [(row["suite"], row["case"].split("bfloat16 ")[1]) for row in others]
    assert kinds == [("conv", "fwd graph"), ("conv", "step graph"), ("layer_memory", "peak of a step")]
    monkeypatch.setattr(graphs, "operators", wrong)
    with pytest.raises(AssertionError, match="triton fwd 3x3 s1 p2 C8-8 g1 differs by"):
        list(graphs.graph_rows(case))


@pytest.mark.usefixtures("replayed")
def test_what_cannot_be_captured_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else is lost."""
    operators = graphs.operators

    def marked(p: Problem, name: str):
        found = operators(p, name)
        return {side: lambda run=run: run() if name != "gather" else [*run(), "host"] for side, run in found.items()}

    def captured(run):
        if "host" in run():
            raise RuntimeError("operation not permitted\n  when stream is capturing")
        return run, run()

    monkeypatch.setattr(graphs, "operators", marked)
    monkeypatch.setattr(graphs, "capture", captured)
    rows = list(graphs.graph_rows(small_case(calls=2)))
    gone = [row for row in rows if row["suite"] == "left_out"]
    assert [(row["way"], row["case"].split()[-1]) for row in gone] == [
        ("gather", side) for side in ("fwd", "dgrad", "wgrad")
    ]
    assert {row["reason"] for row in gone} == {
        "cannot be captured in a CUDA graph: operation not permitted when stream is capturing"
    }
    assert all(tuple(row) == COLUMNS and row["versions"] for row in gone)
    assert {row["way"] for row in rows if row["suite"] == "conv"} == {"triton"}


def test_all_ways_take_their_operands_from_several_sets_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []
    operators = graphs.operators

    def noted(p: Problem, name: str):
        found = operators(p, "gather" if name == "triton" else name)

        def note(run):
            def both():
                used.append((name, p.x.data_ptr()))
                return run()

            return both

        return {side: note(run) for side, run in found.items()}

    monkeypatch.setattr(graphs, "operators", noted)
    monkeypatch.setattr(graphs, "capture", lambda run: (run, run()))
    monkeypatch.setattr(graphs, "calls_of", lambda ways, most: most)  # however slow this machine is
    case = small_case(calls=8)
    list(graphs.graph_rows(case))
    for way in ("dense", "triton", "gather"):
        places = [place for name, place in used if name == way]
        assert len(set(places)) == graphs.SETS
        longest = max(range(len(places) - 8), key=lambda i: len(set(places[i : i + 4])))
        assert len(set(places[longest : longest + 4])) == 4
    again = case.p.again(1)
    assert torch.equal(again.weight, case.p.weight)
    assert not torch.equal(again.x, case.p.x)
    assert again.x.is_contiguous(memory_format=torch.channels_last)
    assert (again.x.shape, again.x.dtype) == (case.p.x.shape, case.p.x.dtype)


def test_slow_ways_are_called_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def fast() -> list[torch.Tensor]:
        return []

    def slow() -> list[torch.Tensor]:
        return []

    took = {fast: 5e-5, slow: 8e-3}
    monkeypatch.setattr(graphs, "_seconds", lambda run: took[run])
    assert graphs.calls_of({"a": [fast], "b": [fast]}) == graphs.CALLS
    assert graphs.calls_of({"a": [fast], "b": [slow]}) == 2
    took[slow] = 1.0
    assert graphs.calls_of({"a": [slow]}) == 1


def test_our_engine_must_agree() -> None:
    class Ours(Packed):
        def why_not(self, shape: Shape | None = None) -> str:
            return "it is not there"

    with pytest.raises(AssertionError, match="the gather engine did not run 3x3 s1 p2 C8-8 g1 rightly"):
        contenders(small_case(), Ours("gather", "cpu"), (Dense(),), set())


def few(grid, g):
    """Return two operations in place of all."""
    found = list(checks_operations(grid, g))
    return [next(o for o in found if o[0] == "conv 3x3 s1 p1 C512-512 g1"), next(o for o in found if "max" in o[0])]


checks_operations = checks.operations


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "operations", few)


@pytest.mark.usefixtures("few_checks")
def test_a_check_allows_twice_the_error_of_pytorch_in_the_same_mode(tmp_path: Path) -> None:
    found = list(checks.check("cpu", ("bfloat16", "exact float32"), ours="gather"))
    assert [(c.name.split()[0], c.mode) for c in found] == [
        (name, mode) for mode in ("bfloat16", "exact float32") for name in ("conv", "max-pool")
    ]
    for checked in found:
        assert checked.passed
        assert checked.allowed >= 2 * checked.error
    assert 1e-2 > found[0].error > 1e-4 > found[2].error > 0
    assert found[2].allowed < 2e-6
    assert checks.keep(found, tmp_path)
    assert checks.missed(tmp_path) == {}


@pytest.mark.usefixtures("few_checks", "replayed")
def test_a_wrong_kernel_has_no_figures_and_all_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convolve = checks.patch_conv2d

    def wrong(x, *args, backend):
        y = convolve(x, *args, backend="gather")
        return y * 1.001 if backend == "triton" and x.dtype == torch.float32 else y

    monkeypatch.setattr(checks, "patch_conv2d", wrong)
    monkeypatch.setattr(checks, "patch_max_pool2d", lambda x, *a, backend: checks_pool(x, *a, backend="gather"))
    assert not checks.keep(checks.check("cpu", ("bfloat16", "float32")), tmp_path)
    reasons = checks.missed(tmp_path)
    assert list(reasons) == ["conv 3x3 s1 p1 C512-512 g1"]
    assert "in float32, at most" in reasons["conv 3x3 s1 p1 C512-512 g1"]
    arguments = argparse.Namespace(only=["3x3"], masked=[0.6], minutes=5.0, no_tune=True)
    timed: list[str] = []

    def rows_of(asked, arguments, told):
        timed.append(asked.name)
        if "C128" in asked.name:
            raise RuntimeError("out of memory")
        yield dict.fromkeys(COLUMNS, "1") | {"suite": "conv", "case": asked.name}

    monkeypatch.setattr(gpu_kernels, "rows_of", rows_of)
    gpu_kernels.measure(arguments, tmp_path, gpu_kernels.time.monotonic())
    assert [name.split()[3] for name in timed] == ["C64-64", "C128-128", "C256-256"]
    assert [row["case"].split()[3] for row in read(tmp_path / "conv.csv")] == ["C64-64", "C256-256"]
    gone = read(tmp_path / "left_out.csv")
    assert [row["case"].split()[3] for row in gone] == ["C128-128", "C512-512"]
    assert gone[0]["reason"] == "RuntimeError: out of memory"
    assert gone[1]["reason"].startswith("off from float64 by")
    assert capsys.readouterr().out.count("left out") == 2


checks_pool = checks.patch_max_pool2d


@pytest.mark.usefixtures("few_checks")
def test_a_kernel_that_does_not_run_is_a_miss(tmp_path: Path) -> None:
    """As the Triton engine on a CPU."""
    assert not checks.keep(checks.check("cpu", ("bfloat16",)), tmp_path)
    assert all("cpu" in reason for reason in checks.missed(tmp_path).values())
    assert len(checks.missed(tmp_path)) == 2
    content = json.loads((tmp_path / "checks.json").read_text())
    assert content["origin"]["versions"]
    assert checks.keep(checks.check("cpu", ("bfloat16",), ours="gather"), tmp_path)  # mended: the last check counts
    assert checks.missed(tmp_path) == {}


@pytest.mark.usefixtures("replayed")
def test_replays_on_other_data_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(c.passed for c in checks.check_graphs("cpu", ours="gather") if "convolution" in c.name) is False
    # A run that is run again gives new tensors, so that those of the capture are old: a replay must write them.

    def capture(run):
        results = run()

        def replay() -> None:
            for old, new in zip(results, run(), strict=True):
                old.copy_(new)

        return replay, results

    monkeypatch.setattr(checks, "capture", capture)
    assert [c.passed for c in checks.check_graphs("cpu", ours="gather")] == [True, True]


def test_several_calls_fill_one_table(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "x") | {"suite": "conv"}
    gpu_kernels.merge([row | {"case": "a", "value": "1"}, row | {"case": "b", "value": "2"}], tmp_path)
    gpu_kernels.merge([row | {"case": "b", "value": "3"}, row | {"case": "c", "value": "4"}], tmp_path)
    assert [(r["case"], r["value"]) for r in read(tmp_path / "conv.csv")] == [("a", "1"), ("b", "3"), ("c", "4")]
    assert [path.name for path in tmp_path.iterdir()] == ["conv.csv"]
