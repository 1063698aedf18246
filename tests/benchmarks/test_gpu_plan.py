"""The plan of a GPU, with tiny commands in place of its lines: limits, signals, logs, the archive, the last table."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as commands
from benchmarks.gpu import goals, plan, runner, stages
from benchmarks.gpu.plan import EVERYTHING, PARTS, SHORT, Line
from benchmarks.measure.device import has_gpu
from benchmarks.measure.rows import COLUMNS, Row, left_out, merge, read
from benchmarks.measure.scales import NAMES

ROOT = Path(__file__).parents[2]
PRINT = "import sys, time; print('begun', flush=True); "
# Keeps a row when it is interrupted; then it ends, or goes on as if nothing had been.
PATIENT = PRINT + (
    "import signal, pathlib\n"
    "def keep(*_):\n    pathlib.Path(sys.argv[1], 'kept.csv').write_text('a row')\n    {}\n"
    "signal.signal(signal.SIGINT, keep)\nprint('ready', flush=True)\ntime.sleep(60)\ntime.sleep(60)"
)


def line(name: str, code: str) -> Line:
    return Line(name, ("{python}", "-c", code, "{rows}"), 20, f"does {name} do?")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    stages.add_options(parser, NAMES)
    return parser.parse_args(arguments)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return what makes a runner of tiny lines."""
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setattr(runner, "LEAST", 1.0)
    (tmp_path / "out" / "rows").mkdir(parents=True)

    def make() -> runner.Runner:
        filled = {"{rows}": [str(tmp_path / "out" / "rows")], "{wheels}": [], "{encoders}": [], "{scale}": ["tiny"]}
        return runner.Runner(tmp_path / "out", tmp_path / "out.tar.gz", [sys.executable], filled)

    return make


def packed(archive: Path) -> set[str]:
    with tarfile.open(archive) as file:
        return {name for name in file.getnames() if "." in name}


def test_lines_run_and_leave_logs_and_an_archive(make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = make()
    good = run.run(line("good", PRINT + "open(sys.argv[1] + '/a.csv', 'w').write('x')"), 20)
    assert good.how == "done"
    assert good.well
    assert packed(run.archive) == {"out/logs/good.log", "out/rows/a.csv"}  # after every line
    bad = run.run(line("bad", PRINT + "print('no kernel', file=sys.stderr); sys.exit(3)"), 20)
    assert bad.how == "exit code 3"
    assert not bad.well
    assert (tmp_path / "out/logs/bad.log").read_text() == "begun\nno kernel\n"
    assert "begun\nno kernel\n" in capsys.readouterr().out
    absent = run.run(Line("absent", ("no-such-program",), 5, "?", needs="no-such-program"), 5)
    assert (absent.how, absent.well) == ("left out, no-such-program is not there", True)
    broken = run.run(Line("broken", ("/no/such/program",), 5, "?"), 5)
    assert broken.how.startswith("could not be started")
    assert run.run(line("late", PRINT), 0.9).how == "not begun, no time was left"
    assert [ended.line.name for ended in run.ended] == ["good", "bad", "absent", "broken", "late"]


def test_a_line_out_of_time_is_interrupted_and_keeps_what_it_has(make, tmp_path: Path) -> None:
    ended = make().run(line("slow", PATIENT.format("sys.exit(1)")), 2)
    assert ended.how == "stopped after 2 s; its rows are kept"
    assert 1.5 < ended.seconds < 30
    assert packed(tmp_path / "out.tar.gz") == {"out/logs/slow.log", "out/rows/kept.csv"}


def test_a_line_that_ignores_the_interrupt_is_killed_with_all_that_it_started(make, tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    child = (
        "import pathlib, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"while True:\n    pathlib.Path({str(beat)!r}).write_text(str(time.time()))\n    time.sleep(0.02)"
    )
    started = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    began = time.monotonic()
    ended = make().run(line("deaf", started + PATIENT.format("pass")), 2)
    assert time.monotonic() - began < 30
    assert ended.how.startswith("stopped after 2 s")
    assert (tmp_path / "out/rows/kept.csv").exists()
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.gpu import stages
from benchmarks.gpu.plan import Line
from benchmarks.__main__ import main
stages.EVERYTHING = (Line("first", ("{{python}}", "-c", "print(1)"), 60, "?"),
                     Line("long", ("{{python}}", "-c", {code!r}, "{{rows}}"), 60, "is it long?"),
                     Line("last", ("{{python}}", "-c", "print(2)"), 60, "?"))
sys.exit(main(["gpu", "--scale", "tiny", "--out", {out!r}, "--archive", {archive!r}]))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.rest)])
def test_a_call_that_is_stopped_packs_what_it_has(tmp_path: Path, signum: int) -> None:
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    program = PROGRAM.format(root=str(ROOT), code=PATIENT.format("sys.exit(1)"), out=str(out), archive=str(archive))
    program = program.replace('"{rows}"', repr(str(out)))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while (said := process.stdout.readline()) != "ready\n":
        assert said, process.wait()
    process.send_signal(signum)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signum
    assert "| line | took | ended | question |" in rest
    assert f"stopped by {signal.Signals(signum).name}" in rest
    assert "left for the next call: python -m benchmarks gpu --stages last" in rest
    assert rest.splitlines()[-1] == f"all of it: {archive}"
    names = {name.split("/")[-1] for name in packed(archive)}
    assert {"first.log", "long.log", "run.json", "plan.md", "kept.csv"} <= names


def test_lines_have_limits_that_fit_their_part() -> None:
    for part, lines in SHORT.items():
        assert sum(found.seconds for found in lines) == PARTS[part] <= 540  # a machine may be lent for ten minutes
        assert all(found.seconds >= 5 and found.answers.endswith("?") for found in lines)
    assert SHORT[1][0].name == "card"
    assert [found.name for found in SHORT[1][-2:]] == ["ncu", "sanitizer"]  # they fail on some machines
    (ncu,) = (found for found in SHORT[1] if found.name == "ncu")
    assert ncu.command[:3] == ("ncu", "--clock-control", "none")
    assert [found.name for found in EVERYTHING if found.asked] == ["engine", "minkowski"]  # a compiler, a network
    for lines in (*SHORT.values(), EVERYTHING, (plan.TUNE,)):
        assert len({found.name for found in lines}) == len(lines)


def test_what_a_line_leaves_goes_to_those_after_it() -> None:
    found = stages.lines_of(options("--plan", "short", "--part", "1"))
    assert [end for _, end in found][:3] == [25, 100, 160]
    assert len(stages.lines_of(options("--plan", "short"))) == sum(map(len, SHORT.values()))
    with_wheels = stages.lines_of(options("--plan", "short", "--part", "2", "--wheels", "wheels"))
    assert with_wheels[0] == (plan.WHEELS, 10)
    assert {end for _, end in stages.lines_of(options("--minutes", "2"))} == {120}
    assert stages.lines_of(options("--tune")) == [(plan.TUNE, 540)]
    names = [found.name for found, _ in stages.lines_of(options("--stages", "step", "engine"))]
    assert names == ["engine", "step"]
    with pytest.raises(ValueError, match="no line is called stepp; choose from engine, wheels"):
        stages.lines_of(options("--stages", "stepp"))


@pytest.mark.parametrize("lines", [*SHORT.values(), EVERYTHING, (plan.TUNE,)], ids=["1", "2", "3", "all", "tune"])
def test_every_placeholder_is_filled(lines: tuple[Line, ...], make) -> None:
    run = make()
    run.filled = {**stages._filled(options("--encoders", "resnet18"), Path("out")), "{wheels}": ["a.whl"]}
    for found in lines:
        command = run.command(found, 60)
        assert not [part for part in command if "{" in part], found.name
        starts = command.index("-m") if "-m" in command else 1
        if command[starts] == "-m" and command[starts + 1].startswith("benchmarks"):
            assert (ROOT / (command[starts + 1].replace(".", "/") + ".py")).exists()
        for part in command:
            if part.endswith(".py") or ".py::" in part:
                assert (ROOT / part.split("::")[0]).exists(), part


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_and_with_a_wrong_name_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert commands.main(["gpu", "--scale", "tiny", "--stages", "stepp"]) == 2
    assert "no line is called stepp" in capsys.readouterr().err


@pytest.mark.rest
def test_a_bare_checkout_without_history_runs(tmp_path: Path) -> None:
    """Nothing is installed but other people's packages, and the commit comes from the environment."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns("results", "__pycache__", "*.so")
    for folder in ("benchmarks", "kernels", "spatspark_fast"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    (copy / "hide.py").write_text(
        "import sys, runpy\n"
        f"sys.path = [p for p in sys.path if not p.startswith({str(ROOT)!r})] + ['']\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
        "sys.argv = ['benchmarks', 'gpu', '--scale', 'tiny', '--stages', 'card', '--out', 'out']\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"SPATSPARK_COMMIT": "abc1234", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    (tmp_path / "cache" / "KERNEL").mkdir(parents=True)
    command = [sys.executable, "hide.py"]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "commit abc1234" in run.stdout
    assert "before the first line, and after the check: 1\n" in run.stdout
    assert "copy_tb_per_s" in run.stdout
    assert run.stdout.splitlines()[-1] == f"all of it: {copy}/out.tar.gz"
    assert any(name.endswith("card.json") for name in packed(copy / "out.tar.gz"))


def row(suite: str, case: str, way: str, against: str, ratio: float, **details: str) -> Row:
    known = {"suite": suite, "case": case, "way": way, "against": against, "ratio": f"{ratio}", "masked": "0.6"}
    return dict.fromkeys(COLUMNS, "") | known | details


def test_goals_are_answered_by_rows_alone(tmp_path: Path) -> None:
    assert goals.goal_table(tmp_path).count("| not measured |  |") == len(goals.GOALS)
    assert goals.goal_table(tmp_path / "none").count("| not measured |  |") == len(goals.GOALS)
    stage = "3x3 s1 {} g1 bfloat16 all"
    rows = [row("conv", stage.format(name), "triton", "dense", 2.5) for name in goals.STAGES[:3]]
    rows += [row("conv", stage.format(goals.STAGES[0]), "gather", "dense", 9.0)]
    rows += [row("conv", stage.format(goals.STAGES[0]), "triton", "dense", 0.9, masked="0.3")]
    merge(rows, tmp_path)
    lines = goals.goal_table(tmp_path).splitlines()
    assert lines[2] == (
        "| every 3x3 stage at least 2x dense cuDNN | p8 C64 2.5x, p4 C128 2.5x, p2 C256 2.5x | 3 of 4 known |"
    )
    assert lines[3] == "| 3x3 at 30 % masked no slower than dense | p8 C64 0.9x | 1 of 4 known |"
    rows = [row("conv", stage.format(goals.STAGES[3]), "triton", "dense", 1.9)]
    rows += [row("conv", stage.format(goals.STAGES[3]), "triton tuned", "dense", 2.1)]
    peer = "3x3 s1 {} g1 bfloat16 step + map eager"
    for end, ratio in zip(goals.ENDS, (1.6, 1.2), strict=True):
        rows += [row("conv", peer.format(end), "triton bf16", "ocnn fp16", ratio)]
        rows += [row("conv", peer.format(end), "triton bf16", "spconv fp16", 2.0)]
        rows += [row("conv", peer.format(end), "triton bf16", "dense-and-mask bf16", 1.0)]
    for rival, ratio in (("dense graph", 2.4), ("dense compiled", 1.8), ("dense-and-mask", 4.0)):
        rows += [row("encoder", "resnet18 batch 128", "auto graph", rival, ratio)]
        rows += [row("encoder", "resnet50 batch 64", "auto graph", rival, ratio)]
    rows += [row("encoder", "resnet18 batch 128", "auto", "dense", 1.1)]
    rows += [row("step", "resnet18 288x288x12 batch 128", "exact", "published", 3.0)]
    rows += [row("step", "resnet18 288x288x12 batch 128", "exact graph", "published", 4.5)]
    rows += [row("step", "resnet50 288x288x12 batch 64", "light", "published", 30)]
    rows += [row("images", "resnet50 224x224x3 batch 64", "exact", "published", 3, value="700")]
    rows += [left_out("a case", "gather", "it cannot be\ncaptured", 0.6)]
    merge(rows, tmp_path)
    table = goals.goal_table(tmp_path)
    for wanted in (
        "p1 C512 2.1x | yes |",
        "| p8 C64 over ocnn fp16 1.6x, p1 C512 over ocnn fp16 1.2x | no |",
        "fastest dense | resnet18 1.8x, resnet50 1.8x | no |",
        "dense-and-mask | resnet18 4x, resnet50 4x | yes |",
        "| exact graph 4.5x | yes |",
        "| step, light decoder, at least 20x the published | not measured |  |",
        "| exact 700 images/s |  |",
        "- gather, a case: it cannot be captured",
    ):
        assert wanted in table
    assert read(tmp_path / "left_out.csv")[0]["reason"] == "it cannot be captured"
