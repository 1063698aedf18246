"""Benchmarks: every speed is a ratio measured in one run, after a parity check."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("patchsparse") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))
