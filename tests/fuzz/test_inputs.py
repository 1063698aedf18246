"""Damaged and hostile inputs have no bad outcome: a few of every suite by default, more of them by `make fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("count", "first"), [(60, 0), pytest.param(800, 10**6, marks=[pytest.mark.rest, pytest.mark.timeout(1200)])]
)
def test_no_input_has_a_bad_outcome(count: int, first: int) -> None:
    # In a process of its own: its children are forked before anything computes.
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--seed", str(first), "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
