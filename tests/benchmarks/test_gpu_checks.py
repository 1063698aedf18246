"""Checks of kernels against float64, on a CPU: what they allow, what a miss costs, what is written.

``gather`` stands for the Triton engine, and a captured run is run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.measure.rows import COLUMNS, read


def few(grid, g):
    """Return two operations in place of all."""
    found = list(checks_operations(grid, g))
    return [next(o for o in found if o[0] == "conv 3x3 s1 p1 C512-512 g1"), next(o for o in found if "max" in o[0])]


checks_operations = checks.operations


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "operations", few)


@pytest.mark.usefixtures("few_checks")
def test_a_check_allows_twice_the_error_of_pytorch_in_the_same_mode(tmp_path: Path) -> None:
    found = list(checks.check("cpu", ("bfloat16", "exact float32"), ours="gather"))
    assert [(c.name.split()[0], c.mode) for c in found] == [
        (name, mode) for mode in ("bfloat16", "exact float32") for name in ("conv", "max-pool")
    ]
    for checked in found:
        assert checked.passed
        assert checked.allowed >= 2 * checked.error
    assert 1e-2 > found[0].error > 1e-4 > found[2].error > 0
    assert found[2].allowed < 2e-6
    assert checks.keep(found, tmp_path)
    assert checks.missed(tmp_path, "bfloat16") == {}


@pytest.mark.usefixtures("few_checks")
def test_a_wrong_kernel_has_no_figures_and_all_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convolve = checks.patch_conv2d

    def wrong(x, *args, backend):
        y = convolve(x, *args, backend="gather")
        return y * 1.02 if backend == "triton" and x.dtype == torch.bfloat16 else y

    monkeypatch.setattr(checks, "patch_conv2d", wrong)
    monkeypatch.setattr(checks, "patch_max_pool2d", lambda x, *a, backend: checks_pool(x, *a, backend="gather"))
    assert not checks.keep(checks.check("cpu", ("bfloat16", "float32")), tmp_path)
    reasons = checks.missed(tmp_path, "bfloat16")
    assert list(reasons) == ["conv 3x3 s1 p1 C512-512 g1"]
    assert "in bfloat16, at most" in reasons["conv 3x3 s1 p1 C512-512 g1"]
    assert checks.missed(tmp_path, "float32") == {}  # figures are of one mode, and so are the checks that they need
    arguments = argparse.Namespace(only=["3x3"], once=[], masked=[0.6], minutes=5.0, no_tune=True)
    timed: list[str] = []

    def rows_of(asked, arguments, told):
        timed.append(asked.name)
        if "C128" in asked.name:
            raise RuntimeError("out of memory")
        yield dict.fromkeys(COLUMNS, "1") | {"suite": "conv", "case": asked.name}

    monkeypatch.setattr(gpu_kernels, "rows_of", rows_of)
    gpu_kernels.measure(arguments, tmp_path, gpu_kernels.time.monotonic())
    assert [name.split()[3] for name in timed] == ["C64-64", "C128-128", "C256-256"]
    assert [row["case"].split()[3] for row in read(tmp_path / "conv.csv")] == ["C64-64", "C256-256"]
    gone = read(tmp_path / "left_out.csv")
    assert [row["case"].split()[3] for row in gone] == ["C128-128", "C512-512"]
    assert gone[0]["reason"] == "RuntimeError: out of memory"
    assert gone[1]["reason"].startswith("off from float64 by")
    assert capsys.readouterr().out.count("left out") == 2


checks_pool = checks.patch_max_pool2d


@pytest.mark.usefixtures("few_checks")
def test_a_kernel_that_does_not_run_is_a_miss(tmp_path: Path) -> None:
    """As the Triton engine on a CPU."""
    assert not checks.keep(checks.check("cpu", ("bfloat16",)), tmp_path)
    missed = checks.missed(tmp_path, "bfloat16")
    assert all("cpu" in reason for reason in missed.values())
    assert len(missed) == 2
    content = json.loads((tmp_path / "checks.json").read_text())
    assert content["origin"]["versions"]
    assert checks.keep(checks.check("cpu", ("bfloat16",), ours="gather"), tmp_path)  # mended: the last check counts
    assert checks.missed(tmp_path, "bfloat16") == {}


def test_replays_on_other_data_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "capture", lambda run: (run, run()))
    assert all(c.passed for c in checks.check_graphs("cpu", ours="gather") if "convolution" in c.name) is False
    # A run that is run again gives new tensors, so that those of the capture are old: a replay must write them.

    def capture(run):
        results = run()

        def replay() -> None:
            for old, new in zip(results, run(), strict=True):
                old.copy_(new)

        return replay, results

    monkeypatch.setattr(checks, "capture", capture)
    assert [c.passed for c in checks.check_graphs("cpu", ours="gather")] == [True, True]


def test_a_capture_draws_no_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card refuses generators in a capture that were not made known to it before."""

    def capture(run):
        for _ in range(2):
            run()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "Generator", None)
            patched.setattr(torch, "randn", None)
            results = run()
        return lambda: None, results

    monkeypatch.setattr(checks, "capture", capture)
    found = list(checks.check_graphs("cpu", ours="gather"))
    assert [c.reason for c in found] == ["", ""]
