"""One process at a time writes a run, none after the death of its owner; signals end a command in one line."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatspark_fast.common.locks import owned
from spatspark_fast.evaluate.__main__ import main as evaluate
from spatspark_fast.experiments.__main__ import main as experiments
from spatspark_fast.forecast.__main__ import main as forecast

from ..forecast.forecasts import SMALL, moving_rain, save_checkpoint, write_windows
from ..prepare.archives import write_archive
from ..pretrain.runs import arguments, checkpoint, pretrain, rows, start
from ..refusals import refusal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs locks and signals of POSIX")

OWNER = """
import os, sys, time
from pathlib import Path
from spatspark_fast.common.locks import owned
with owned(Path(sys.argv[1])):
    if not os.fork():
        time.sleep(600)  # a worker, which lives on
    print("owns", flush=True)
    time.sleep(600)
"""


def test_the_folder_of_another_process_is_refused_and_nothing_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", write_windows(tmp_path / "rain.h5", moving_rain(2, 6, 64, 64))
    model = save_checkpoint(tmp_path / "model.ckpt", lengths=(3, 3), **SMALL)
    assert pretrain(run, trainer__epochs=1) == 0
    command = [sys.executable, "-c", OWNER, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "owns\n"
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        capsys.readouterr()
        for main, argv in (
            (lambda argv: pretrain(run, *argv, trainer__epochs=2), ["--resume"]),
            (evaluate, [f"--checkpoint={model}", f"--data.path={data}", f"--out={run}", "--overwrite"]),
            (forecast, [f"--checkpoint={model}", f"--data.path={data}", f"--out={run}", "--overwrite"]),
            (experiments, [f"--data.path={data}", f"--out={run}"]),
        ):
            error = refusal(capsys, main, argv)
            assert f"--out {run} is in use by another process ({process.pid} on " in error
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        process.kill()  # its child lives on
        process.wait()
        assert pretrain(run, "--resume", trainer__epochs=2) == 0
        assert [int(row["step"]) for row in rows(run)] == list(range(1, 9))
        assert not (run / ".lock").exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_folder_that_nothing_came_into_is_removed_again(tmp_path: Path) -> None:
    with owned(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / ".lock").exists()
    assert os.listdir(tmp_path) == []


@pytest.mark.rest
def test_of_two_processes_that_resume_one_run_one_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(run, trainer__epochs=1) == 0
    both = [start(arguments(run, "--resume", trainer__epochs=20)) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], said
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 81))


@pytest.mark.rest
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_prepare_in_one_line_and_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    archive, out = write_archive(tmp_path / "in", list(range(300))), tmp_path / "out.h5"
    argv = ["--source=knmi", f"--data.path={archive}", f"--out={out}", "--crop=0:48,0:40", "--data.input_length=3"]
    process = start([*argv, "--data.output_length=2", "--data.num_workers=2"], command="prepare")
    part = tmp_path / "out.h5.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 10_000):
        time.sleep(0.002)
    process.send_signal(signum)
    process.send_signal(signum)  # a second one does not disturb the cleaning up
    said = process.communicate()[0]
    assert process.returncode == 128 + signum, said
    assert [line for line in said.splitlines() if "reading" not in line and "times" not in line][-1:] == [
        f"spatspark-fast: stopped by {signum.name}"
    ]
    assert "Traceback" not in said
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.rest
@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5, 4.0])
def test_a_signal_in_a_start_leaves_nothing(tmp_path: Path, delay: float) -> None:
    process = start(arguments(tmp_path / "new" / "run", trainer__epochs=500))
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode in (143, -signal.SIGTERM), said
    assert "Traceback" not in said
    if process.returncode == 143 and "saved" not in said:
        assert not list(tmp_path.rglob(".*"))
    if (tmp_path / "new" / "run" / "checkpoints" / "last.ckpt").exists():
        assert checkpoint(tmp_path / "new" / "run")["global_step"] > 0


@pytest.mark.rest
def test_a_closed_terminal_saves_and_stops(tmp_path: Path) -> None:
    """SIGHUP comes, and whatever is written to the terminal fails from then on."""
    out = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        words = [sys.executable, "-m", "spatspark_fast.pretrain", *arguments(out, trainer__epochs=5000)]
        os.execv(sys.executable, words)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 10_000)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == 128 + signal.SIGHUP
    assert checkpoint(out)["global_step"] == int(rows(out)[-1]["step"]), "no step is lost"
    assert not list(tmp_path.rglob(".*.tmp"))


PROGRAM = """
from spatspark_fast.{command}.__main__ import main
code = main({argv!r})
with open({log!r}, "a") as file:
    print(code, file=file)
"""


@pytest.mark.rest
@pytest.mark.parametrize("command", ["pretrain", "prepare"])
def test_a_program_without_a_guard_runs_once(tmp_path: Path, command: str) -> None:
    """Reading processes are spawned, and do not run the program that started them."""
    log = tmp_path / "log"
    if command == "pretrain":
        data = write_windows(tmp_path / "rain.h5", moving_rain(4, 6, 64, 64), split="train")
        argv = arguments(tmp_path / "run", data__path=data, data__num_workers=2, trainer__epochs=1)
    else:
        archive = write_archive(tmp_path / "in", list(range(20)))
        argv = ["--source=knmi", f"--data.path={archive}", f"--out={tmp_path / 'out.h5'}", "--crop=0:48,0:40"]
        argv += ["--data.input_length=3", "--data.output_length=2", "--data.num_workers=2"]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(command=command, argv=argv, log=str(log)))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert log.read_text() == "0\n"
