"""Run suites of the benchmarks in this process: the imports, which take longest, are there already."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.subjects import step_ways

ROOT = Path(__file__).parents[2]
# Plugins of the outer session that must not act twice in one process.
QUIET = ("no:cacheprovider", "no:xdist", "no:timeout", "no:faulthandler")


@contextmanager
def _as_in_a_new_process(arguments: list[str]) -> Iterator[None]:
    """Forget what was compared before, hide the outer session, and let rows name the command that a reader types."""
    step_ways.forget()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    with (
        mock.patch.dict(os.environ, kept, clear=True),
        mock.patch.object(sys, "orig_argv", [sys.executable, "-m", "pytest", *arguments]),
    ):
        yield
    step_ways.forget()


def run_suites(paths: list[str], results: Path) -> tuple[int, str]:
    """Run suites at the tiny scale, as ``pytest benchmarks/...`` does; return the exit status and what it printed.

    Args:
        paths: of files or single tests, from the root of the repository.
        results: folder for the CSV files.
    """
    arguments = [*paths, "--scale", "tiny", "--results", str(results), "-q"]
    told = [str(ROOT / path) if path in paths else path for path in arguments]
    printed = StringIO()
    with _as_in_a_new_process(arguments), redirect_stdout(printed):
        status = pytest.main([*told, *(part for plugin in QUIET for part in ("-p", plugin))])
    return int(status), printed.getvalue()
