"""No figure of a wrong result: the gate, and every suite with a broken kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import test_conv as conv_suite
from benchmarks import test_mask_sweep as sweep_suite
from benchmarks.measure.rows import Row, make_row
from benchmarks.measure.scales import scale_of
from benchmarks.measure.timing import GATE, Gate, Ratio, check_close, check_parity, in_turn
from benchmarks.subjects.convolutions import Shape

from .broken import break_engines
from .inline import run_suites

TINY = scale_of("tiny", torch.device("cpu"))
SHAPE = Shape(2, 16, 16)


class Noted(list[Row]):
    """Stand for the fixture ``record``."""

    def __call__(self, *what, **details) -> None:
        self.row(make_row(*what, **details))

    def row(self, row: Row) -> None:
        self.append(row)


class Untimed:
    """Stand for pytest-benchmark."""

    def pedantic(self, run, rounds: int) -> None:
        run()


@pytest.fixture(autouse=True)
def closed():
    GATE.close()
    yield
    GATE.close()


def test_nothing_is_timed_or_noted_before_a_check() -> None:
    ran = []
    with pytest.raises(AssertionError, match="nothing was compared"):
        in_turn({"way": lambda: ran.append(1)}, rounds=1)
    assert not ran
    with pytest.raises(AssertionError, match="nothing was compared"):
        make_row("conv", "case", "a", "b", Ratio.exact(2.0), (1.0, 2.0), "s")


def test_a_check_that_fails_closes_the_gate() -> None:
    right = torch.arange(4.0)
    check_parity("same", right, right, 1e-6)
    assert GATE.worst() == 0
    for wrong in (right * 1.01, right * torch.nan, right[:3]):
        with pytest.raises(AssertionError, match="no figure is given"):
            check_parity("other", wrong, right, 1e-3)
    with pytest.raises(AssertionError, match=r"loss differs by 1\.00e"):
        check_close("loss", 2.0, 1.0, 1e-3)
    with pytest.raises(AssertionError, match="nothing was compared"):
        in_turn({"way": lambda: None}, rounds=1)


def test_the_worst_difference_stands_in_the_row() -> None:
    gate = Gate()
    gate.let("a", 1e-7, 1e-5)
    gate.let("b", 1e-6, 1e-5)
    assert gate.worst() == 1e-6
    check_close("loss", 1.0 + 1e-5, 1.0, 1e-3)
    row = make_row("conv", "case", "a", "b", Ratio(2.0, 1.9, 2.1), (1.0, 2.0), "s", masked=0.6, limit=2.5)
    assert (row["parity"], row["ratio"], row["masked"], row["limit"], row["floor"]) == (
        "1.0e-05",
        "2",
        "0.6",
        "2.5",
        "",
    )


def test_a_right_kernel_is_measured_and_a_broken_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Noted()
    conv_suite.layer_rows(record, SHAPE, (torch.float32,), TINY)
    sweep_suite.test_layer_sweep(Untimed(), record, TINY, SHAPE, 0.6)
    assert len(record) == 5 + 1
    assert all(float(row["ratio"]) > 0 and float(row["parity"]) < 1e-4 for row in record)
    break_engines(monkeypatch)
    for run in (
        lambda: conv_suite.layer_rows(record, SHAPE, (torch.float32,), TINY),
        lambda: sweep_suite.test_layer_sweep(Untimed(), record, TINY, SHAPE, 0.6),
    ):
        with pytest.raises(AssertionError, match=r"fwd differs by .* no figure is given"):
            run()
    assert len(record) == 5 + 1


@pytest.mark.parametrize("suite", ["test_encoder.py", "test_step.py"])
def test_a_broken_kernel_makes_a_suite_refuse(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_engines(monkeypatch)
    status, printed = run_suites([f"benchmarks/{suite}"], tmp_path)
    assert status == 1, printed
    assert "no figure is given" in printed
    assert " passed" not in printed.splitlines()[-1]
    assert "measured ratios" not in printed
    assert not list(tmp_path.iterdir())
