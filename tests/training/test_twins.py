"""What one command refuses its twin refuses too: both trainings, and forecast beside evaluate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spatspark_fast.evaluate.__main__ import main as evaluate
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.forecast.__main__ import main as forecast
from spatspark_fast.pretrain.__main__ import main as pretrain

from ..finetune.runs import arguments as finetuning
from ..forecast.forecasts import moving_rain, save_checkpoint, write_windows
from ..pretrain.runs import arguments as pretraining
from ..refusals import refusal

TRAININGS: dict[str, tuple[Callable[[list[str]], int], Callable[..., list[str]]]] = {
    "pretrain": (pretrain, pretraining),
    "finetune": (finetune, finetuning),
}
# What is wrong, and what both say of it; "pretrain" and "finetune" stand for options of one alone.
ONE_VALUE: dict[str, Any] = {"data__synthetic_size": 64, "data__batch_size": 1, "data__crop": 32}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"data__synthetic_size": 100}, "cannot be cut into patches of 32: crop or pad it to 96 x 96 or 128 x 128"),
    "crop": ({"data__path": "FILE", "data__crop": 40}, "--data.crop is 40: give a multiple of --model.patch 32"),
    "large crop": ({"data__path": "FILE", "data__crop": 96}, "96"),
    "frames": ({"data__path": "FILE", "data__input_length": 30}, "8 frames"),
    "split": ({"data__path": "FILE", "data__split": "test"}, "no split 'test'"),
    "encoder": ({"model__encoder": "resnet19"}, "unknown encoder 'resnet19'"),
    "patch": ({"model__patch": 20}, "patch=20"),
    "levels": ({"model__levels": 5}, "levels"),
    "width": ({"model__decoder": "unet", "model__decoder_width": 33}, "decoder_width=33"),
    "device": ({"trainer__device": "tpu"}, "--trainer.device"),
    "rate": ({"optim__base_lr": "nan"}, "--optim.base_lr"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("command", TRAININGS)
def test_both_trainings_refuse_the_same(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = MISTAKES[name]
    file = write_windows(tmp_path / "windows.h5", moving_rain(5, 8, 64, 64), split="train")
    changes = {option: file if value == "FILE" else value for option, value in changes.items()}
    main, arguments = TRAININGS[command]
    assert words in refusal(capsys, main, arguments(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# A channel with one value: the deepest map of one patch, and the gate of rexnet, which has one value for each window.
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one patch, pretrain": ("pretrain", {"mask__ratio": 0.75}),
    "one patch, finetune": ("finetune", {"data__path": "FILE", "data__crop": 32, "data__validation_fraction": 0}),
    "smaat": (
        "finetune",
        {"data__path": "FILE", "data__validation_fraction": 0, "model__kind": "smaat", "model__base_width": 4},
    ),
    "gate, pretrain": ("pretrain", {"model__encoder": "rexnet_100"}),
    "gate, finetune": ("finetune", {"model__encoder": "rexnet_100"}),
}


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_with_one_value_is_named_by_both(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, changes = NORMS[case]
    side = 16 if case == "smaat" else 64
    file = write_windows(tmp_path / "windows.h5", moving_rain(5, 8, side, side), split="train")
    changes = {option: file if value == "FILE" else value for option, value in changes.items()}
    main, arguments = TRAININGS[command]
    assert main(arguments(tmp_path / "run", **changes, data__batch_size=1)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no statistics to train with" in said
    assert "take a larger" in said


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """Return a file that has data in the first frame of its windows alone."""
    rates = moving_rain(10, 8, 64, 64)
    missing = np.zeros(rates.shape, bool)
    missing[:, 1:] = True
    return write_windows(tmp_path / "silent.h5", rates, split="train", missing=missing)


def test_nothing_is_learned_or_scored_where_there_is_no_data(
    silent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = "has a pixel with data in the frames to come"
    assert words in refusal(capsys, finetune, finetuning(out, data__path=silent))
    assert not out.exists()
    argv = ["--data.path", str(silent), "--data.split=train", "--out", str(out), "--panels=0", "--fss_scales"]
    said = refusal(capsys, evaluate, [*argv, "--spectrum=false"])
    assert "nothing to score: in 10 windows there is no pixel with data" in said
    assert not out.exists()


def test_csi_cannot_choose_without_rain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = moving_rain(10, 8, 64, 64)
    rates[8:] = 0  # the newest validate
    file = write_windows(tmp_path / "windows.h5", rates, split="train")
    said = refusal(capsys, finetune, finetuning(tmp_path / "run", data__path=file, trainer__score="csi"))
    assert "it rains more than 1 mm/h" in said
    assert "--trainer.score mse" in said


def test_scores_say_where_they_are_undefined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = write_windows(tmp_path / "dry.h5", np.zeros((1, 5, 32, 32), np.float32))
    argv = ["--data.path", str(dry), "--out", str(tmp_path / "out"), "--panels=0", "--fss_scales", "--spectrum=false"]
    assert evaluate([*argv, "--thresholds", "0.5", "2"]) == 0
    assert "rain is above 0.5, 2 mm/h: scores are undefined there (-)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps=0"], "--steps is 0"),
        (["--tile=40"], "--tile is 40: give a multiple of 32"),
        (["--tile=0"], "--tile is 0"),
        (["--tile=-32"], "--tile is -32"),
        (["--device=abacus"], "--device abacus"),
        (["--data.path=/no/such"], "/no/such"),
        (["--data.split=train"], "no split 'train'"),
        (["--checkpoint=/no/such.ckpt"], "/no/such.ckpt"),
    ],
)
def test_forecast_and_evaluate_refuse_the_same(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_windows(tmp_path / "windows.h5", moving_rain(2, 8, 64, 64))
    options: dict[str, Any] = {"encoder": "test_resnet", "decoder": "light", "decoder_width": 16}
    checkpoint = save_checkpoint(tmp_path / "best.ckpt", lengths=(3, 3), **options)
    given = [*([] if more[0].startswith("--checkpoint") else [f"--checkpoint={checkpoint}"]), f"--data.path={file}"]
    for command in (forecast, evaluate):
        assert words in refusal(capsys, command, [*given, f"--out={tmp_path / 'out'}", *more])
    assert not (tmp_path / "out").exists()
