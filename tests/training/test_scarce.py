"""A training that runs out of disk, of file handles or of memory says so in a sentence, and loses nothing."""

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..common.scarce import limited, resized, size_limit, small_disk
from ..matrix import rest_but
from ..pretrain.runs import arguments, checkpoint, pretrain, rows
from .test_finishing import TRAININGS, Training

TENSORBOARD: dict[str, Any] = {"trainer__tensorboard": "true", "trainer__epochs": 2}


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], int]) -> str:
    """Run what must end with 2 and one sentence; return that."""
    capsys.readouterr()
    assert run() == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1, error
    return error


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("training", "share"),
    rest_but(
        [(TRAININGS[0], 0.7), (TRAININGS[1], 0.9)],
        [(training, share) for training in TRAININGS for share in (0.05, 0.3, 0.5, 0.7, 0.9, 0.97)],
    ),
)
def test_a_full_disk_at_any_time_is_said_and_the_run_goes_on(
    tmp_path: Path, training: Training, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.run(tmp_path / "whole", **TENSORBOARD) == 0
    size = size_of(tmp_path / "whole")
    with small_disk(int(share * size)) as disk:
        out, changes = disk / "run", TENSORBOARD | {"data__cache": tmp_path / "cache"}
        error = refused(capsys, lambda: training.run(out, **changes))
        assert "No space left on device; make room on that disk" in error
        assert not [path for path in disk.rglob(".*") if path.is_file()], "no rest"
        last = out / "checkpoints" / "last.ckpt"
        if last.exists():
            assert f"cannot write {out}" in error or "tensorboard" in error
            assert checkpoint(out)["position"] > 0
        resized(disk, 3 * size)
        assert training.run(out, "--resume", **changes) == 0
        assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(tmp_path / "whole")]


@pytest.mark.parametrize("training", TRAININGS[:1])
def test_a_limit_on_files_keeps_the_old_ones(
    tmp_path: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert training.run(out, trainer__epochs=1) == 0
    before = (out / "checkpoints" / "last.ckpt").read_bytes()
    with size_limit(len(before) // 2):
        error = refused(capsys, lambda: training.run(out, "--resume", trainer__epochs=2))
    assert "last.ckpt: File too large; raise the limit" in error
    assert "the same command with --resume goes on" in error
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == before


# torch's loader stumbles in its __del__ where it could not be made.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.rest)])
def test_file_handles_that_run_out_are_said(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"data__num_workers": workers, "data__resident": "off", "trainer__epochs": 1}
    assert pretrain(tmp_path / "first", **changes) == 0  # what is imported late is there
    said = [said_with_handles(free, tmp_path / f"run-{free}", changes, capsys) for free in range(6)]
    assert said[0]
    assert all("Too many open files; raise the limit on open files (ulimit -n)" in one for one in said if one), said
    assert not list(tmp_path.rglob(".lock"))


def said_with_handles(free: int, out: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Train with so many handles left; return the sentence, or nothing if they are enough."""
    held: list[int] = []
    with limited(resource.RLIMIT_NOFILE, 64 + max(map(int, os.listdir("/proc/self/fd")))):
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for handle in held[:free]:
            os.close(handle)
        try:
            capsys.readouterr()
            code, error = pretrain(out, **changes), capsys.readouterr().err
        finally:
            for handle in held[free:]:
                os.close(handle)
    assert "Traceback" not in error
    assert (code, error.count("\n")) in ((0, 0), (2, 1)), error
    return error


def test_memory_that_runs_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("out of memory", "--data.batch_size", "--model.decoder_width")
    changes: dict[str, Any] = {"model__decoder_width": 8192, "model__decoder": "unet", "trainer__epochs": 1}
    torch.zeros(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, taken + (512 << 20)):
        error = refused(capsys, lambda: pretrain(tmp_path / "run", **changes))
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.rest
def test_torchrun_without_devices_is_refused(tmp_path: Path) -> None:
    """It would start trainings that know nothing of each other, in one folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*launcher, "-m", "spatspark_fast.pretrain", *arguments(tmp_path / "run", trainer__device="cpu")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "torchrun started 2 processes for a training on 1 devices: give --trainer.devices 2" in done.stderr
    assert not (tmp_path / "run").exists()
