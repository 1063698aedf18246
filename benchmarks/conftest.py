"""Collect the measured ratios: printed at the end, and written as CSV with ``--results``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from .measure.machine import RESULTS, device_name, folder_name
from .measure.rows import Row, line, make_row, merge
from .measure.scales import NAMES, Scale, scale_of
from .measure.timing import GATE

_rows = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--results`` and ``--scale``."""
    parser.addoption(
        "--results", metavar="DIR", help="write a CSV per suite into DIR; 'auto': benchmarks/results/<this device>"
    )
    default = os.environ.get("BENCHMARK_SCALE", "quick")
    parser.addoption("--scale", choices=NAMES, default=default, help="sizes and rounds (env BENCHMARK_SCALE; quick)")


def pytest_configure(config: pytest.Config) -> None:
    """Begin with no rows."""
    config.stash[_rows] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a benchmark for each encoder or masked share of the scale, if it takes one."""
    sizes = scale_of(str(metafunc.config.getoption("--scale")))
    for name, values in (
        ("encoder", sizes.encoders),
        ("step_encoder", sizes.step_encoders),
        ("masked", sizes.masked),
        ("swept", sizes.sweep),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture(scope="session")
def scale(pytestconfig: pytest.Config) -> Scale:
    """Return the sizes that were asked for, on the GPU if there is one."""
    return scale_of(str(pytestconfig.getoption("--scale")))


@pytest.fixture(autouse=True)
def gate():
    """Close the gate, so that no check serves for the figures of another benchmark."""
    GATE.close()
    yield
    GATE.close()


@pytest.fixture(autouse=True)
def tf32():
    """Let float32 use the fast matrix units of a GPU, in all ways alike."""
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class Recorder:
    """Note a ratio, as :func:`~benchmarks.measure.rows.make_row` takes it, or a whole row."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, *what: Any, **details: Any) -> None:
        """Note a ratio."""
        self._rows.append(make_row(*what, **details))

    def row(self, row: Row) -> None:
        """Note a whole row."""
        self._rows.append(row)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    """Return what notes the rows of a benchmark."""
    return Recorder(request.config.stash[_rows])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print all rows, and write them where they were asked for."""
    rows = config.stash[_rows]
    if not rows:
        return
    terminalreporter.section(f"measured ratios ({device_name()}, {torch.get_num_threads()} threads)")
    for row in rows:
        terminalreporter.write_line(line(row))
    folder = config.getoption("--results")
    if folder:
        merge(rows, RESULTS / folder_name() if folder == "auto" else Path(folder))
