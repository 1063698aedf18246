"""A run that was killed or stopped goes on as if nothing had happened, bit by bit."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from spatspark_fast.common.files import atomic_path
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain import run as training_run
from spatspark_fast.pretrain.__main__ import main
from spatspark_fast.training.checkpoints import AtomicCheckpointIO
from spatspark_fast.training.metrics import MetricsCsv, trim_metrics
from spatspark_fast.training.rundir import RunDirectory

from ..matrix import rest_but
from .runs import arguments, checkpoint, pretrain, rows, same, same_training, start


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Give a function that sends this process a signal when a step is logged."""
    log = MetricsCsv.log_metrics

    def arm(step_to_stop_at: int, signum: int) -> None:
        def log_and_stop(self: MetricsCsv, metrics: dict[str, float], step: int | None = None) -> None:
            log(self, metrics, step)
            if step == step_to_stop_at:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(MetricsCsv, "log_metrics", log_and_stop)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield arm
    assert before == {signum: signal.getsignal(signum) for signum in before}, "a signal was not given back"


@pytest.fixture
def noisy_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add dropout, so that the global generators matter."""
    build = training_run.build_model

    def build_noisy(config: Any) -> SparK:
        model = build(config)

        def drop(module: nn.Module, inputs: Any, densified: list[torch.Tensor]) -> list[torch.Tensor]:
            return [F.dropout(level, 0.2, module.training) for level in densified]

        model.densify.register_forward_hook(drop)
        return model

    monkeypatch.setattr(training_run, "build_model", build_noisy)


def kill_after(step: int, argv: list[str], out: Path) -> None:
    """Run the command and kill it hard when a step is logged."""
    process = start(argv)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.csv").exists() or len(rows(out)) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run logs no steps"
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("encoder", "workers"), rest_but([("test_resnet", 2)], [("resnet10t", 0), ("test_resnet", 2)]))
def test_sigkill_loses_at_most_an_epoch_and_resume_is_bitwise_exact(tmp_path: Path, encoder: str, workers: int) -> None:
    changes = {
        "data__synthetic_windows": 6,  # 3 steps an epoch, 9 in all
        "data__num_workers": workers,
        "model__encoder": encoder,
        "optim__ema": 0.9,
    }
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after(5, arguments(killed, **changes), killed)
    assert checkpoint(killed)["position"] in (3, 6)
    assert pretrain(killed, "--resume", **changes) == 0
    assert pretrain(whole, **changes) == 0
    assert same_training(checkpoint(killed), checkpoint(whole))
    assert rows(killed, times=False) == rows(whole, times=False)
    assert [int(row["step"]) for row in rows(killed)] == list(range(1, 10))
    assert same(load_file(killed / "encoder.safetensors"), load_file(whole / "encoder.safetensors"))


@pytest.mark.usefixtures("noisy_model")
@pytest.mark.parametrize(
    ("signum", "code", "step", "changes"),
    [
        pytest.param(signal.SIGINT, 130, 6, {}, marks=pytest.mark.rest),
        (signal.SIGTERM, 143, 8, {}),  # the last step of an epoch
        pytest.param(
            signal.SIGTERM, 143, 5, {"trainer__accumulate": 2, "data__synthetic_windows": 10}, marks=pytest.mark.rest
        ),
        (signal.SIGINT, 130, 6, {"trainer__log_every": 3, "mask__schedule": "interval", "mask__ratio_end": 0.8}),
    ],
)
def test_a_signal_saves_and_resume_goes_on_within_the_epoch(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stop_at: Callable[[int, int], None],
    signum: int,
    code: int,
    step: int,
    changes: dict[str, Any],
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert pretrain(whole, **changes) == 0
    stop_at(step, signum)
    assert pretrain(stopped, **changes) == code
    error = capsys.readouterr().err
    assert str(stopped / "checkpoints" / "last.ckpt") in error
    assert "Traceback" not in error
    assert checkpoint(stopped)["global_step"] >= step
    stop_at(-1, signum)
    assert main([f"--out={stopped}", "--resume"]) == 0, "options come from the run itself"
    assert same_training(checkpoint(stopped), checkpoint(whole))
    assert rows(stopped, times=False) == rows(whole, times=False)


@pytest.mark.usefixtures("noisy_model")
def test_dropout_follows_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name))
        assert pretrain(tmp_path / name, trainer__epochs=1, trainer__seed=seed) == 0
    a, b, c = (checkpoint(tmp_path / name) for name in "abc")
    assert same_training(a, b)
    assert not same_training(a, c)


def test_max_steps_ends_within_an_epoch_and_more_steps_go_on_from_there(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", trainer__max_steps=6, trainer__keep_every=1) == 0
    assert checkpoint(tmp_path / "run")["position"] == 6
    assert checkpoint(tmp_path / "run", "epoch-0001")["position"] == 4
    assert pretrain(tmp_path / "run", "--resume", trainer__max_steps=10) == 0
    assert checkpoint(tmp_path / "run")["position"] == 10
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(1, 11))
    assert (tmp_path / "run" / "config.1.yaml").exists()


def test_resume_from_a_kept_checkpoint_repeats_what_came_after(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain(out, trainer__keep_every=1) == 0
    first, lines = checkpoint(out), rows(out, times=False)
    assert main([f"--resume={out / 'checkpoints' / 'epoch-0002.ckpt'}"]) == 0
    assert same_training(first, checkpoint(out))
    assert rows(out, times=False) == lines


def test_resume_into_another_folder_leaves_the_first_alone(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "a", trainer__epochs=2) == 0
    before = (tmp_path / "a" / "checkpoints" / "last.ckpt").read_bytes()
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert pretrain(tmp_path / "b", f"--resume={path}", trainer__epochs=3) == 0
    assert path.read_bytes() == before
    assert checkpoint(tmp_path / "b")["global_step"] == 12
    assert [int(row["step"]) for row in rows(tmp_path / "b")] == [9, 10, 11, 12]


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", "--resume", trainer__epochs=1) == 0
    assert checkpoint(tmp_path / "run")["global_step"] == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of one epoch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain(out, trainer__epochs=1) == 0
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__encoder": "test_convnext", "trainer__epochs": 2}, ["another model", "test_resnet -> test_convnext"]),
        ({"data__input_length": 4, "trainer__epochs": 2}, ["data.input_length (3 -> 4)"]),
        ({"data__synthetic_windows": 6, "trainer__epochs": 2}, ["4 batches an epoch", "now there are 3"]),
    ],
)
def test_resume_refuses_what_cannot_go_on(
    finished: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert pretrain(finished, "--resume", **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_resume_refuses_a_damaged_and_a_foreign_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    assert pretrain(out, "--resume", trainer__epochs=2) == 2
    assert "damaged" in capsys.readouterr().err
    torch.save({"state_dict": {}}, path)
    assert pretrain(out, "--resume", trainer__epochs=2) == 2
    assert "no checkpoint of a training: it lacks the options or the position" in capsys.readouterr().err


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"config": {}, "position": 1, "state_dict": {}, "global_step": 1}, target)
    before = target.read_bytes()

    def save_half(checkpoint: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({}, target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(target)["position"] == 1


def test_temporary_files_lie_beside_their_target_and_stale_ones_are_cleared(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    with atomic_path(run.last) as temporary:
        assert temporary.parent == run.last.parent
        temporary.write_text("new")
        stale = run.checkpoints / ".last.ckpt.killed.tmp"
        stale.write_text("half")
        assert not run.last.exists()
    assert run.last.read_text() == "new"
    run.prepare()
    assert not stale.exists()


def test_metrics_are_trimmed_to_the_checkpoint_and_torn_rows_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\r\n1,0.9\r\n2,0.8\r\n3,0.7\r\n4")
    trim_metrics(path, 2)
    assert path.read_text().split() == ["step,loss", "1,0.9", "2,0.8"]
    trim_metrics(path, 0)
    assert path.read_text().split() == ["step,loss"]
    trim_metrics(tmp_path / "absent.csv", 0)
    assert os.listdir(tmp_path) == ["metrics.csv"]
