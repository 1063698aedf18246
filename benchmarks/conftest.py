"""Collect the measured ratios: printed at the end, and written as CSV with ``--results DIR``."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .timing import Ratio

COLUMNS: tuple[str, ...] = (
    "suite", "case", "way", "against", "ratio", "low", "high", "value", "against_value", "unit",
    "device", "threads", "torch", "commit",
)  # fmt: skip

Recorder = Callable[..., None]
_rows = pytest.StashKey[list[dict[str, object]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="DIR", help="write one CSV per suite into DIR, replacing it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []


def device_name() -> str:
    """Return the GPU's name, or the processor's with its instruction set."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    """Return a function that notes the ratio ``against`` / ``way`` of two measured values."""
    rows = request.config.stash[_rows]

    def note(
        suite: str, case: str, way: str, against: str, ratio: Ratio, values: tuple[float, float], unit: str
    ) -> None:
        fields = (
            suite, case, way, against, round(ratio.median, 3), round(ratio.low, 3), round(ratio.high, 3),
            f"{values[0]:.4g}", f"{values[1]:.4g}", unit,
            device_name(), torch.get_num_threads(), torch.__version__, commit(),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, fields, strict=True)))

    return note


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    terminalreporter.section(f"measured ratios ({device_name()}, {torch.get_num_threads()} threads)")
    for row in rows:
        terminalreporter.write_line(
            f"{row['suite']:8} {row['case']:44} {row['way']:10} {row['ratio']:6}x ({row['low']}-{row['high']}) "
            f"over {row['against']}"
        )
    folder = config.getoption("--results")
    if folder:
        for suite in sorted({str(row["suite"]) for row in rows}):
            path = Path(folder) / f"{suite}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(row for row in rows if row["suite"] == suite)
