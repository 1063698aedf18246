"""Memory that runs out in the threads of the C++ engine: a MemoryError, and not the end of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchsparse.backends.cpp import library

pytestmark = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))


@pytest.mark.rest
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc/self/statm are Linux's")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer's shadow memory takes more address space than that")
def test_a_thread_without_memory_raises_memory_error():
    command = [sys.executable, "-m", "tests.kernels.scarce"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    times = dict(line.split(": ") for line in done.stdout.splitlines())
    assert len(times) == 5
    assert all(int(count) > 0 for count in times.values()), times
