"""The GPU script on a machine without one: its refusal, its order of cases, its tables, its rows of peers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Packed, "why_not", lambda *_: "Triton is not installed")
    assert gpu_kernels.main([]) == 2
    assert capsys.readouterr().err == f"{COMMAND} cannot run the triton engine: Triton is not installed\n"


def test_the_first_masked_share_is_timed_for_all_shapes_first() -> None:
    order = list(gpu_kernels.cases(["3x3", "stride2", "densify"], [0.6, 0.3]))
    assert [share for share, _ in order] == [0.6] * 11 + [0.3] * 11
    assert [shape[1] for _, shape in order[:4]] == [64, 128, 256, 512]
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
    case = Case(problem(Shape(2, 8, 8), 0.6, 2, torch.bfloat16, "cpu", (3, 3)), 0.6, rounds=2)
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


def test_densifying_is_compared_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", lambda run: (SimpleNamespace(replay=run), run()))
    rows = gpu_densify.densify_rows((2, 8), 0.6, 1, 2, "cpu")
    assert [row["case"] for row in rows] == [f"norm + unpack p2 C8 {kind}" for kind in ("fwd", "step")]
    assert all(tuple(row) == COLUMNS and row["against"] == "batch_norm, unpack" for row in rows)
    monkeypatch.setattr(gpu_densify, "unpack", lambda packed, grid, fill: unpack(packed, grid, fill + 1))
    with pytest.raises(AssertionError, match="norm \\+ unpack y p2 C8 differs by"):
        gpu_densify.densify_rows((2, 8), 0.6, 1, 2, "cpu")


def test_layers_are_compared_before_their_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where a captured run is run again and ``gather`` stands for Triton."""
    operators = graphs.operators

    def replayed(run):
        return SimpleNamespace(replay=run), run()

    def wrong(p: Problem, name: str):
        found = operators(p, "gather" if name == "triton" else name)
        return {side: lambda run=run: [run()[0] * 1.1] for side, run in found.items()} if name == "triton" else found

    monkeypatch.setattr(graphs, "capture", replayed)
    monkeypatch.setattr(graphs, "operators", lambda p, name: operators(p, "gather" if name == "triton" else name))
    case = Case(problem(Shape(2, 8, 8), 0.6, 2, torch.bfloat16, "cpu", (3, 3)), 0.6, rounds=2, calls=3)
    found = contenders(case, Packed("gather", "cpu"), (DenseAndMask(),), set())
    rows = [*graphs.graph_rows(case, found), *peak_rows(case, found)]
    layers = [(row["case"].split()[-1], row["way"], row["against"]) for row in rows if row["against"] == "dense"]
    assert layers == [(side, way, "dense") for side in ("fwd", "dgrad", "wgrad") for way in ("gather", "triton")]
    assert all(float(row["limit"]) > 1 for row in rows if row["against"] == "dense")
    others = [(row["suite"], row["case"].split("bfloat16 ")[1]) for row in rows if row["against"] != "dense"]
    assert others == [("conv", "fwd graph"), ("conv", "step graph"), ("layer_memory", "peak of a step")]
    monkeypatch.setattr(graphs, "operators", wrong)
    with pytest.raises(AssertionError, match="fwd 3x3 s1 p2 C8-8 g1 differs by"):
        graphs.graph_rows(case, found)


def test_our_engine_must_agree() -> None:
    class Ours(Packed):
        def why_not(self, shape: Shape | None = None) -> str:
            return "it is not there"

    case = Case(problem(Shape(2, 8, 8), 0.6, 2, torch.bfloat16, "cpu", (3, 3)), 0.6, rounds=2)
    with pytest.raises(AssertionError, match="the gather engine did not run 3x3 s1 p2 C8-8 g1 rightly"):
        contenders(case, Ours("gather", "cpu"), (Dense(),), set())


def test_several_calls_fill_one_table(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    row = dict.fromkeys(COLUMNS, "x") | {"suite": "conv"}
    gpu_kernels.save([row | {"case": "a", "value": "1"}, row | {"case": "b", "value": "2"}], tmp_path)
    gpu_kernels.save([row | {"case": "b", "value": "3"}, row | {"case": "c", "value": "4"}], tmp_path)
    assert [(r["case"], r["value"]) for r in read(tmp_path / "conv.csv")] == [("a", "1"), ("b", "3"), ("c", "4")]
