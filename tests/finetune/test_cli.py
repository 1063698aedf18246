"""The command line of finetune: what wins over what, and wrong input of every kind in one sentence."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spatspark_fast.finetune.__main__ import main
from spatspark_fast.finetune.cli import COMMAND, parse_finetune
from spatspark_fast.finetune.config import FinetuneConfig, forecaster_name, forecaster_options
from spatspark_fast.models.registry import build_forecaster
from spatspark_fast.training.command import preset_names

from ..matrix import rest_but
from ..pretrain.runs import pretrain
from ..pretrain.test_cli import (
    a_folder,
    empty,
    missing,
    nan_first,
    odd_size,
    rain,
    text,
    too_few_frames,
    truncated,
    write,
)
from .runs import finetune


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert pretrain(out, trainer__max_steps=1) == 0
    return out / "checkpoints" / "last.ckpt"


def no_future(folder: Path) -> Path:
    return write(folder / "past.h5", rain(8, 3, 64, 64))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, ["absent.h5", "does not exist"]),
        (a_folder, ["not a file"]),
        (text, ["text.h5", "not a readable HDF5 file"]),
        (truncated, ["truncated.h5"]),
        (empty, ["empty"]),
        (too_few_frames, ["2 frames", "fewer than"]),
        (no_future, ["past.h5", "fewer than 3 + 3"]),
        (odd_size, ["60 x 64", "patches of 32"]),
        (nan_first, ["window 1", "NaN"]),
    ],
)
def test_wrong_data_ends_in_one_sentence_and_leaves_nothing(
    make: Callable[[Path], Path], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert finetune(out, data__path=make(tmp_path), data__validation_fraction=0) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize("workers", rest_but([0], [0, 2]))
def test_bad_values_found_while_validating_end_in_one_sentence(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = rain(40, 6, 64, 64)
    images[39, 0, 5, 5] = float("nan")
    path = write(tmp_path / "late.h5", images)
    changes = {"data__num_workers": workers, "data__validation_fraction": 0.5}
    assert finetune(tmp_path / "out", data__path=path, trainer__epochs=1, **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "window 39" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--init=/no/such.ckpt"], ["/no/such.ckpt", "no such file"]),
        (["--model.kind=unet"], ["--model.kind", "spatspark", "smaat"]),
        (["--model.translation=gru"], ["--model.translation", "recurrent"]),
        (["--model.freeze=encoder"], ["--model.freeze is encoder", "--init"]),
        (["--model.encoder=resnet19"], ["unknown encoder 'resnet19'", "resnet18"]),
        (["--model.decoder_width=10"], ["decoder_width=10"]),
        (["--data.validation_fraction=1"], ["--data.validation_fraction is 1.0", "below 1"]),
        (["--data.validation_fraction=0", "--trainer.patience=3"], ["--trainer.patience is 3", "give 0"]),
        (["--data.validation_fraction=0.99", "--data.synthetic_windows=3"], ["none is left to train on"]),
        (["--data.output_length=0"], ["--data.output_length", "at least 1"]),
        (["--data.flip=true"], ["--data.path"]),
        (["--data.synthetic_size=100"], ["100 x 100", "96 x 96 or 128 x 128"]),
        (["--loss.ssim_weight=-1"], ["--loss.ssim_weight", "at least 0"]),
        (["--loss.weighting=heavy"], ["--loss.weighting", "rain"]),
        (["--trainer.compile=yes"], ["--trainer.compile", "off"]),
        (["--optim.base_lr=nan"], ["--optim.base_lr"]),
        (["--preset=nl51"], ["unknown preset 'nl51'", "nl50-smaat"]),
        (["--mask.ratio=0.5"], ["mask"]),
        (["--resume"], ["--out"]),
    ],
)
def test_wrong_options_end_in_one_sentence(
    argv: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert os.listdir(tmp_path) == []


def test_initial_weights_that_do_not_fit_end_in_one_sentence(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half.ckpt").write_bytes(pretrained.read_bytes()[:4000])
    (tmp_path / "half.safetensors").write_bytes((pretrained.parents[1] / "encoder.safetensors").read_bytes()[:500])
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    encoder = pretrained.parents[1] / "encoder.safetensors"
    cases = [
        (tmp_path / "half.ckpt", [], "is damaged"),
        (tmp_path / "half.safetensors", [], "--init: cannot read encoder weights"),
        (tmp_path / "other.ckpt", [], "lacks options or weights"),
        (pretrained, ["--model.encoder=resnet18"], "--model.encoder is resnet18, but --init"),
        (pretrained, ["--data.input_length=4"], "was trained with 3: leave the option out"),
        (pretrained, ["--model.kind=smaat"], "not a SmaAtUNet"),
        (
            pretrained,
            ["--model.freeze=both", "--model.kind=spark", "--model.output_norm=input_patch"],
            "nothing to train",
        ),
        (
            pretrained.parents[1] / "encoder.safetensors",
            ["--model.freeze=decoder", "--data.input_length=3"],
            "encoder only",
        ),
        (encoder, ["--data.input_length=5"], "does not fit encoder"),
    ]
    for init, more, words in cases:
        assert finetune(tmp_path / "out", *more, init=init) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error, error
        assert not (tmp_path / "out").exists()


def test_later_wins_defaults_preset_init_config_command_line(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("data:\n  batch_size: 7\n  num_workers: 3\ninit: some.ckpt\n")
    demands = {"model.encoder": "resnet34", "model.decoder_width": 96}
    argv = ["--data.batch_size=9", "--config", str(path), "--preset=nl50-resnet50"]
    config = parse_finetune(argv, demands=demands).config
    assert config.data.batch_size == 9, "the command line wins, also before --config"
    assert config.data.num_workers == 3, "the file wins over the preset"
    assert (config.model.encoder, config.model.decoder_width) == ("resnet34", 96), "weights win over the preset"
    assert config.init == "some.ckpt"
    assert parse_finetune([*argv, "--init=none"]).config.init is None
    assert config.loss == FinetuneConfig().loss


def test_the_preset_follows_the_data_and_forecasts_begin_as_persistence() -> None:
    assert parse_finetune([]).preset == "demo"
    assert parse_finetune(["--data.path=rain.h5"]).preset == "nl50-resnet18"
    assert parse_finetune([]).config.model.output_norm == "persistence"
    assert parse_finetune(["--init=a.ckpt"]).config.model.output_norm == "persistence"
    assert parse_finetune(["--init=a.ckpt", "--model.output_norm=none"]).config.model.output_norm == "none"


@pytest.mark.parametrize("preset", preset_names(COMMAND.presets))
def test_every_preset_builds_a_forecaster(preset: str) -> None:
    config = parse_finetune([f"--preset={preset}"]).config
    kind, options = forecaster_options(config, 47.83)
    with torch.device("meta"):
        model = build_forecaster(kind, config.data.input_length, 12, options)
    assert (model.in_length, model.out_length) == (12, 12)
    assert forecaster_name(config)


def test_names_tell_models_apart() -> None:
    argvs = [[], ["--init=a.ckpt"], ["--model.kind=spark"], ["--model.kind=smaat"], ["--model.translation=attention"]]
    assert len({forecaster_name(parse_finetune(argv).config) for argv in argvs}) == len(argvs)
