"""Collect the measured ratios: printed at the end, and written as CSV with ``--results``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .measure.device import aside, has_gpu
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
    parser.addoption("--encoders", metavar="A,B", help="timm encoders in place of the scale's")
    parser.addoption("--no-compile", action="store_true", help="run no way compiled")


def pytest_configure(config: pytest.Config) -> None:
    """Begin with no rows."""
    config.stash[_rows] = []


def sizes_of(config: pytest.Config) -> Scale:
    """Return the sizes that were asked for, on the GPU if there is one."""
    found = scale_of(str(config.getoption("--scale")))
    if asked := config.getoption("--encoders"):
        encoders = tuple(str(asked).split(","))
        found = replace(found, encoders=encoders, step_encoders=encoders)
    return replace(found, compiled=()) if config.getoption("--no-compile") else found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a benchmark for each encoder or masked share of the scale, if it takes one."""
    sizes = sizes_of(metafunc.config)
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
    return sizes_of(pytestconfig)


@pytest.fixture(autouse=True)
def gate():
    """Close the gate, so that no check serves for the figures of another benchmark."""
    GATE.close()
    yield
    GATE.close()


@pytest.fixture(autouse=True)
def gpu():
    """Let a GPU do its best in all ways alike: fast matrix units for float32, the fastest of cuDNN's kernels."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    if has_gpu():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    with aside():
        yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


class Recorder:
    """Note a ratio, as :func:`~benchmarks.measure.rows.make_row` takes it, or a whole row.

    A row is written at once where ``--results`` asks for it: a benchmark that is stopped keeps what it has found.
    """

    def __init__(self, rows: list[Row], folder: Path | None) -> None:
        self._rows = rows
        self._folder = folder

    def __call__(self, *what: Any, **details: Any) -> None:
        """Note a ratio."""
        self.row(make_row(*what, **details))

    def row(self, row: Row) -> None:
        """Note a whole row."""
        self._rows.append(row)
        if self._folder is not None:
            merge([row], self._folder)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    """Return what notes the rows of a benchmark."""
    asked = request.config.getoption("--results")
    folder = None if not asked else RESULTS / folder_name() if asked == "auto" else Path(asked)
    return Recorder(request.config.stash[_rows], folder)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print all rows."""
    rows = config.stash[_rows]
    if not rows:
        return
    terminalreporter.section(f"measured ratios ({device_name()}, {torch.get_num_threads()} threads)")
    for row in rows:
        terminalreporter.write_line(line(row))
