"""A run can always be completed, a complete one says so, and one goes on with its own data only; for both trainings."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch

from ..finetune import runs as finetuning
from ..forecast.forecasts import moving_rain, write_windows
from ..matrix import rest_but
from ..pretrain import runs as pretraining
from ..pretrain.runs import checkpoint, rows, start


class Training(NamedTuple):
    """One of the two trainings: how to run it, and what it leaves at its end."""

    command: str
    run: Callable[..., int]
    arguments: Callable[..., list[str]]
    results: tuple[str, ...]


TRAININGS = (
    Training("pretrain", pretraining.pretrain, pretraining.arguments, ("encoder.safetensors", "reconstruction.png")),
    Training("finetune", finetuning.finetune, finetuning.arguments, ("checkpoints/best.ckpt", "forecast.png")),
)
IDS = [training.command for training in TRAININGS]


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("training", "steps"),
    rest_but([(TRAININGS[0], None)], [(training, steps) for training in TRAININGS for steps in (None, 6)]),
)
def test_a_run_killed_after_its_last_checkpoint_is_completed_by_resume(
    tmp_path: Path, training: Training, steps: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``steps`` the last one lies within an epoch."""
    out, changes = tmp_path / "run", {"trainer__epochs": 2, "trainer__max_steps": steps or "null"}
    process = start(training.arguments(out, **changes), command=training.command)
    try:
        deadline = time.monotonic() + 120
        last = out / "checkpoints" / "last.ckpt"
        while not last.exists() or checkpoint(out)["global_step"] < (steps or 8):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    assert not (out / training.results[-1]).exists()
    before = last.read_bytes(), rows(out)
    assert training.run(out, "--resume", **changes) == 0
    assert (last.read_bytes(), rows(out)) == before, "nothing is trained"
    assert all((out / name).exists() for name in training.results)

    capsys.readouterr()
    complete = content(out)
    assert training.run(out, "--resume", **changes) == 0
    shown = capsys.readouterr()
    assert f"{out} is complete, at step {steps or 8}: give more --trainer.epochs" in shown.out
    assert (shown.out.count("\n"), shown.err) == (1, "")
    assert content(out) == complete
    picture = out / training.results[-1]
    picture.unlink()
    assert training.run(out, "--resume", **changes) == 0
    assert picture.read_bytes() == complete[picture.name]


@pytest.mark.parametrize("training", [pytest.param(TRAININGS[0], marks=pytest.mark.rest), TRAININGS[1]], ids=IDS)
def test_other_data_under_the_same_name_are_refused(
    tmp_path: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, rain = tmp_path / "rain.h5", tmp_path / "run", moving_rain(10, 6, 64, 64, seed=1)
    write_windows(data, rain, split="train")
    changes: dict[str, Any] = {"data__path": data, "data__num_workers": 0, "trainer__epochs": 1}
    assert training.run(out, **changes) == 0
    before = content(out)

    def with_other(values: np.ndarray, scale: float = 1.0) -> str:
        write_windows(tmp_path / "new.h5", values, split="train")
        with h5py.File(tmp_path / "new.h5", "a") as file:
            file.attrs["scale_mm_per_5min"] = scale * float(np.asarray(file.attrs["scale_mm_per_5min"]))
        (tmp_path / "new.h5").replace(data)
        assert training.run(out, "--resume", **changes | {"trainer__epochs": 2}) == 2
        assert content(out) == before
        return capsys.readouterr().err

    one_pixel = rain.copy()
    one_pixel[4, 2, 5, 5] += 0.25
    assert "trained on other data, which differ in the values" in with_other(one_pixel)
    assert "differ in the values" in with_other(rain[::-1].copy())
    assert "differ in the scale in mm per 5 min" in with_other(rain, scale=1.5)
    # The same data in another place, packed another way, are the same.
    write_windows(tmp_path / "moved.h5", rain, split="train")
    with h5py.File(tmp_path / "moved.h5", "a") as file:
        images = np.asarray(file["train/images"])
        del file["train/images"]
        file.create_dataset("train/images", data=images, compression="gzip", chunks=(1, *images.shape[1:]))
    changes["data__path"] = tmp_path / "moved.h5"
    assert training.run(out, "--resume", **changes | {"trainer__epochs": 2}) == 0


def test_a_checkpoint_without_a_mark_goes_on_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert pretraining.pretrain(out, trainer__epochs=1) == 0
    state = checkpoint(out)
    del state["data"]
    torch.save(state, out / "checkpoints" / "last.ckpt")
    assert pretraining.pretrain(out, "--resume", trainer__epochs=2) == 0
    assert "a version that did not mark its data" in capsys.readouterr().out


def test_a_complete_run_is_not_taken_up_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert pretraining.pretrain(out, trainer__epochs=1) == 0
    shutil.copy(out / "checkpoints" / "last.ckpt", tmp_path / "copy.ckpt")
    argv = f"--resume={tmp_path / 'copy.ckpt'}"
    assert pretraining.pretrain(tmp_path / "other", argv, trainer__epochs=1) == 2
    assert "is at step 4, so it is complete: give more --trainer.epochs" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
