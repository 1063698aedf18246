"""Timings of kernels on a machine without a GPU: refusals, the order of cases, tables, rows of peers.

Where something stands for the GPU, ``gather`` stands for the Triton engine, and a captured run is run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import densify as gpu_densify
from benchmarks.gpu import graphs
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


def test_groups_are_timed_at_all_shares_or_at_the_first_alone() -> None:
    found = list(gpu_kernels.cases(["3x3"], [0.6, 0.3], ["stem"]))
    assert [(asked.group, asked.masked) for asked in found] == [
        *[("3x3", 0.6)] * 4,
        *[("3x3", 0.3)] * 4,
        ("stem", 0.6),
    ]


def test_several_calls_fill_one_table(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "x") | {"suite": "conv"}
    gpu_kernels.merge([row | {"case": "a", "value": "1"}, row | {"case": "b", "value": "2"}], tmp_path)
    gpu_kernels.merge([row | {"case": "b", "value": "3"}, row | {"case": "c", "value": "4"}], tmp_path)
    assert [(r["case"], r["value"]) for r in read(tmp_path / "conv.csv")] == [("a", "1"), ("b", "3"), ("c", "4")]
    assert [path.name for path in tmp_path.iterdir()] == ["conv.csv"]
