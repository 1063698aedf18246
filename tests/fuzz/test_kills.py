"""A handful of random kills; ``python -m tests.fuzz.kills`` does as many as one likes."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.rest, pytest.mark.skipif(sys.platform == "win32", reason="forks")]


@pytest.mark.parametrize(
    ("signal", "commands"),
    [("KILL", ["pretrain", "finetune"]), ("KILL", ["prepare-merge", "forecast"]), ("TERM", ["pretrain", "prepare"])],
)
def test_killed_commands_go_on_as_if_nothing_had_been(signal: str, commands: list[str]) -> None:
    """In a process of its own, which computes nothing before it forks."""
    argv = ["--kills", "4", "--signal", signal, "--commands", *commands]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.kills", *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("|\n") == 2 + len(commands)
