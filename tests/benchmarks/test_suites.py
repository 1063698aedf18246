"""The suites run from end to end at a tiny scale, and their rows fill tables, pictures and headlines."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as commands
from benchmarks.measure.rows import COLUMNS, Row, left_out, merge, read
from benchmarks.measure.scales import NAMES, scale_of
from benchmarks.reports import headline as headline_command
from benchmarks.reports import report as report_command
from benchmarks.reports.headline import headlines
from benchmarks.reports.report import HEADLINE, MEASURED, devices, fill, markers, newest, read_folder, report
from benchmarks.subjects import steps

from .inline import ROOT, run_suites

CHOSEN = (
    "benchmarks/test_conv.py::test_conv3x3[3x3 s1 p1 C512-512 g1]",
    "benchmarks/test_conv.py::test_peers[3x3 s1 p1 C512-512 g1]",
    "benchmarks/test_conv.py::test_a_new_mask[3x3 s1 p1 C512-512 g1]",
    "benchmarks/test_conv.py::test_pointwise[1-512-2048]",
    *(f"benchmarks/test_{name}.py" for name in ("pool", "norm", "encoder", "mask_sweep", "step", "memory", "data")),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Return the rows of all suites, at a tiny scale."""
    folder = tmp_path_factory.mktemp("results")
    status, printed = run_suites(list(CHOSEN), folder)
    assert status == 0, printed
    return read_folder(folder)


def test_every_suite_writes_rows_that_say_all(rows: list[Row]) -> None:
    assert {row["suite"] for row in rows} == {
        "conv", "pool", "norm", "encoder", "mask_sweep", "step", "split", "step_memory", "encoder_memory", "data",
        "images",
    }  # fmt: skip
    for row in rows:
        assert tuple(row) == COLUMNS
        assert float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
        assert 0 <= float(row["parity"]) <= 2e-2
        assert all(row[name] for name in ("case", "way", "against", "unit", "device", "cpu", "versions", "commit"))
        assert row["command"].startswith("pytest ")
        assert str(Path.home()) not in row["command"]
    sweep = [row for row in rows if row["suite"] == "mask_sweep"]
    assert {row["masked"] for row in sweep} == {"0", "0.6"}
    assert all(float(row["limit"]) > 1 and float(row["floor"]) > 0 for row in sweep)
    steps = {(row["way"], row["against"]) for row in rows if row["suite"] == "step" and row["masked"]}
    ours = ("exact", "sparse", "light")
    assert steps == {(way, rival) for way in ours for rival in ("published", "dense")} | {("dense", "published")}
    for way in (*ours, "published", "dense"):  # the parts of a step are the step
        split = [row for row in rows if row["suite"] == "split" and row["way"] == way]
        assert len(split) == 4
        assert sum(float(row["value"]) for row in split) == pytest.approx(float(split[0]["against_value"]), rel=1e-2)


def test_the_report_fills_pages_and_is_idempotent(rows: list[Row], tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    merge(rows, results / "this-machine")
    gpu = [row | {"device": "NVIDIA H200", "date": "2030-01-01 00:00"} for row in rows]
    merge(gpu, results / "nvidia-h200")
    merge([row | {"date": "2001-01-01 00:00"} for row in rows], results / "older-machine")
    (tmp_path / "docs").mkdir()
    for page, region in (("README.md", HEADLINE), ("docs/benchmarks.md", MEASURED)):
        begin, end = markers(region)
        (tmp_path / page).write_text(f"# Title\n\n{begin}\n{end}\n\nThe rest.\n")
    written = report(results, tmp_path)
    first = {path: path.read_bytes() for path in written}
    assert report(results, tmp_path) == written
    assert {path: path.read_bytes() for path in written} == first
    assert len([path for path in written if path.suffix == ".svg"]) == 9
    assert all(1_000 < len(content) < 150_000 for path, content in first.items() if path.suffix == ".svg")
    readme, docs = ((tmp_path / page).read_text() for page in ("README.md", "docs/benchmarks.md"))
    assert readme.startswith("# Title\n")
    assert readme.endswith("The rest.\n")
    assert "Never run on a GPU" not in docs
    assert "older-machine" not in readme  # the newest CPU and the newest GPU
    assert readme.index("nvidia-h200") < readme.index("this-machine")
    for what in (
        "test_resnet encoder",
        "test_resnet training step, exact decoder",
        "peak memory of the step, `light` decoder",
    ):
        assert readme.count(f"| {what} |") == 2
    for title in ("Whole encoder", "Single layers", "Whole training step", "Peak memory"):
        assert title not in readme
        assert docs.count(f"**{title}**") == 3
    for target in re.findall(r"\]\(([^)#]+)\)", docs):
        if "figures" in target:
            assert (tmp_path / "docs" / target).exists()


def test_headlines_are_ratios_of_the_rows(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = headlines(rows)
    name = "encoder: test_resnet, 60% masked, auto over dense"
    assert {"ratio", "low", "high", "config"} == set(found[name])
    assert "torch" in str(found[name]["config"])
    assert any(name.startswith("step: ") and name.endswith("light over published") for name in found)
    assert any(name.startswith("step_memory: ") for name in found)
    assert all(not name.startswith("conv") or " all, " in name for name in found)

    def suites(command: list[str], **_) -> argparse.Namespace:
        merge(rows, Path(command[command.index("--results") + 1]))
        return argparse.Namespace(returncode=status)

    monkeypatch.setattr(headline_command.subprocess, "run", suites)
    target, status = tmp_path / "headline.json", 1
    assert commands.main(["headline", "--json", str(target)]) == 1
    assert not target.exists()  # a parity check failed
    status = 0
    assert commands.main(["headline", "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == found
    capsys.readouterr()
    assert commands.main(["headline"]) == 0  # as `make headline` calls it
    assert len(capsys.readouterr().out.splitlines()) == len(found)


@pytest.mark.rest
def test_a_suite_runs_in_a_process_of_its_own_from_any_directory(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"{ROOT}/benchmarks/test_pool.py",
        "-k",
        "auto",
        "-p",
        "no:cacheprovider",
    ]
    options = ["--scale", "tiny", "--results", "rows"]
    run = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (row, *_) = read(tmp_path / "rows" / "pool.csv")
    assert row["command"] == "pytest benchmarks/test_pool.py -k auto -p no:cacheprovider --scale tiny --results rows"


def test_markers_must_be_there() -> None:
    begin, end = markers(HEADLINE)
    assert fill(f"a\n{begin}\nold\n{end}\nb", HEADLINE, "new") == f"a\n{begin}\n\nnew\n\n{end}\nb"
    other_begin, other_end = markers(MEASURED)
    for page in ("no markers", f"{end}\n{begin}", f"{begin}\n{begin}\n{end}", f"{other_begin}\n{other_end}"):
        with pytest.raises(ValueError, match="must hold the lines"):
            fill(page, HEADLINE, "new")


def test_the_readme_shows_small_gains_too() -> None:
    """Its one table: little masked, the exact decoder over the best dense step, and each rival."""
    found = newest(devices(report_command.RESULTS))
    for name, block in report_command.summaries(found).items():
        lines = [line.split(" | ") for line in block.splitlines() if line.startswith("| ") and "| what |" not in line]
        if report_command._is_gpu(found[name]):
            assert lines, name  # what was measured there depends on the time that there was
            continue
        assert 8 <= len(lines) <= 12, name
        shown = {(cells[0].removeprefix("| "), cells[1]): cells[2:5] for cells in lines}
        rows = found[name]
        for what, suite, masked, way, rivals in (
            ("resnet18 encoder", "encoder", "0.3", "auto", ("dense", "dense-and-mask")),
            ("resnet18 encoder", "encoder", "0.6", "auto", ("dense", "dense-and-mask")),
            ("resnet18 training step, exact decoder", "step", "0.6", "exact", ("dense", "published")),
        ):
            cells = shown[what, f"{float(masked):.0%}".replace("%", " %")]
            for cell, rival in zip(cells, rivals, strict=False):
                wanted = {"suite": suite, "masked": masked, "way": way, "against": rival}
                row = next(r for r in rows if wanted.items() <= r.items() and r["case"].startswith("resnet18"))
                assert cell.startswith(f"{float(row['ratio']):.2f}x")
        assert shown["resnet18 encoder", "60 %"][2].endswith(")"), "MinkowskiEngine is missing"


def test_without_rows_of_a_gpu_the_page_says_so(rows: list[Row]) -> None:
    cpu, gpu = rows, [row | {"device": "NVIDIA H100 80GB HBM3"} for row in rows]
    assert next(iter(report_command.blocks({"a": cpu}).values())) == report_command.NO_GPU
    assert report_command.NO_GPU not in report_command.blocks({"a": cpu, "b": gpu}).values()


def test_captured_and_compiled_rivals_stand_in_the_tables(rows: list[Row]) -> None:
    """The fastest dense one counts, and what was left out is said."""
    row = next(r for r in rows if r["suite"] == "encoder" and r["against"] == "dense")
    graph = row | {"way": "auto graph", "ratio": "2.5", "low": "2.4", "high": "2.6", "against": "dense graph"}
    compiled = graph | {"against": "dense compiled", "ratio": "2.1", "low": "2.0", "high": "2.2"}
    gone = left_out("a case", "gather graph", "it asks | the host", 0.6)
    (page,) = (report_command.blocks({"gpu": [graph, compiled, gone]})[name] for name in ("gpu",))
    assert "packed, CUDA graph | 60 % | 2.10x (2.00-2.20)" in page
    assert "| a case | 60 % | gather graph | it asks / the host |" in page


def test_layers_of_a_gpu_stand_in_a_table_of_their_own(rows: list[Row]) -> None:
    layer = next(r for r in rows if r["suite"] == "conv" and r["case"].endswith(" all") and r["against"] == "dense")
    shape = layer["case"].rsplit(" ", 2)[0]
    gpu = [
        layer | {"case": f"{shape} bfloat16 {side}", "way": way, "ratio": ratio, "low": ratio, "high": ratio}
        for side in ("fwd", "dgrad", "wgrad", "all")
        for way, ratio in (("gather", "0.9"), ("triton", "2.2"), ("triton tuned", "2.4"))
    ]
    page = report_command.blocks({"gpu": gpu})["gpu"]
    assert "replayed CUDA graphs" in page
    assert "| 60 % | 2.40x | 2.40x | 2.40x | 2.40x |" in page
    assert "`pytest benchmarks/test_conv.py`" not in page  # that table is of CPUs
    summary = report_command.summaries({"gpu": gpu})["gpu"]
    assert summary.count("| 60 % | 2.40x |") == 1


def test_the_summary_shows_captured_ways_over_the_fastest_dense_one(rows: list[Row]) -> None:
    encoder = next(r for r in rows if r["suite"] == "encoder" and r["way"] == "auto" and r["against"] == "dense")
    step = next(r for r in rows if r["suite"] == "step" and r["way"] == "exact" and r["against"] == "dense")

    def over(row: Row, way: str, against: str, ratio: str) -> Row:
        return row | {"way": way, "against": against, "ratio": ratio, "low": ratio, "high": ratio}

    gpu = [over(encoder, "auto", "dense", "1.1"), over(encoder, "auto graph", "dense graph", "2.3")]
    gpu += [over(encoder, "auto graph", "dense compiled", "2.1"), over(encoder, "auto graph", "dense-and-mask", "4")]
    gpu += [over(step, "exact", "dense", "1.2"), over(step, "exact graph", "dense graph", "1.5")]
    gpu += [over(step, "exact graph", "published", "4.5")]
    summary = report_command.summaries({"gpu": gpu})["gpu"]
    assert "| test_resnet encoder, one CUDA graph | 60 % | 2.10x | 4.00x |" in summary
    assert "| test_resnet encoder, kernel by kernel | 60 % | 1.10x |" in summary
    assert "| test_resnet training step, exact decoder | 60 % | 1.50x | 4.50x |" in summary


def test_the_committed_pages_are_those_of_the_committed_results() -> None:
    """Tables of README and docs are never written by hand."""
    found = devices(report_command.RESULTS)
    assert found
    readme, docs = ((ROOT / page).read_text() for page in ("README.md", "docs/benchmarks.md"))
    for name, block in report_command.blocks(found).items():
        assert block in docs, f"run python -m benchmarks report: docs/benchmarks.md is not that of {name}"
    for name, block in report_command.summaries(newest(found)).items():
        assert block in readme, f"run python -m benchmarks report: README.md is not that of {name}"


def test_scales_exist_for_both_devices() -> None:
    for device in (torch.device("cpu"), torch.device("cuda")):
        sizes = [scale_of(name, device) for name in NAMES]
        assert [s.layer_rounds for s in sizes] == sorted(s.layer_rounds for s in sizes)
        assert all(s.size % 32 == 0 for s in sizes)
    assert scale_of("full", torch.device("cuda")).step_encoders == ("resnet18", "resnet50", "convnext_base")
    assert scale_of("quick", torch.device("cuda")).for_encoder("convnext_base").batch == 64
    with pytest.raises(ValueError, match="scale 'huge' is unknown"):
        scale_of("huge")


def test_the_backward_pass_of_the_encoder_is_not_taken_for_the_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages that both feed a decoder, each with a backward pass that takes one tick of the clock."""
    clock = [0.0]
    monkeypatch.setattr(steps, "_now", lambda: clock[0])

    def ticking(x: torch.Tensor) -> torch.Tensor:
        y = x * 2

        def tick(gradient: torch.Tensor) -> None:
            clock[0] += 1

        y.register_hook(tick)
        return y

    def step(marks: steps.Marks) -> None:
        marks("data")
        shallow = ticking(torch.ones(1, requires_grad=True))
        deep = ticking(shallow * 1)
        shallow, deep = marks("encoder", [shallow, deep])
        loss = ticking(shallow + deep)
        marks("decoder")
        loss.sum().backward()
        marks("encoder")
        clock[0] += 5
        marks("optimiser")

    assert steps.split(step) == {"data": 0, "encoder": 2, "decoder": 1, "optimiser": 5}
