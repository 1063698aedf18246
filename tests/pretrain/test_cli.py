"""The command line of pretrain: what wins over what, and wrong input of every kind in one sentence."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from spatspark_fast.common.cli import run_command
from spatspark_fast.common.errors import RunStopped, UserError
from spatspark_fast.common.options import to_plain
from spatspark_fast.models.choices import DECODE_RATIO
from spatspark_fast.pretrain.__main__ import main
from spatspark_fast.pretrain.cli import COMMAND, parse_pretrain
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.command import preset_names

from ..matrix import rest_but
from .runs import pretrain

NAN, SHORT, HALF = (3, 1, 10, 10), (4, 2, 64, 64), (4, 6, 64, 64)


def write(path: Path, images: np.ndarray, split: str = "train") -> Path:
    """Write a file in the layout of NL-50."""
    with h5py.File(path, "w") as file:
        file.create_dataset(f"{split}/images", data=images, compression="gzip")
        file.attrs["scale_mm_per_5min"] = 47.83
    return path


def rain(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32) * 0.1


def missing(folder: Path) -> Path:
    return folder / "absent.h5"


def a_folder(folder: Path) -> Path:
    return folder


def text(folder: Path) -> Path:
    path = folder / "text.h5"
    path.write_text("no radar here")
    return path


def truncated(folder: Path) -> Path:
    path = write(folder / "truncated.h5", rain(8, 6, 64, 64))
    path.write_bytes(path.read_bytes()[:3000])
    return path


def no_split(folder: Path) -> Path:
    return write(folder / "split.h5", rain(4, 6, 64, 64), split="test")


def empty(folder: Path) -> Path:
    return write(folder / "empty.h5", rain(0, 6, 64, 64))


def three_axes(folder: Path) -> Path:
    return write(folder / "axes.h5", rain(4, 64, 64))


def too_few_frames(folder: Path) -> Path:
    return write(folder / "frames.h5", rain(4, 2, 64, 64))


def odd_size(folder: Path) -> Path:
    return write(folder / "size.h5", rain(4, 6, 60, 64))


def nan_first(folder: Path) -> Path:
    images = rain(4, 6, 64, 64)
    images[1, 2, 5, 5] = np.nan
    return write(folder / "nan.h5", images)


def nan_late(folder: Path) -> Path:
    images = rain(40, 6, 64, 64)
    images[30, 0, 5, 5] = np.nan
    return write(folder / "late.h5", images)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, ["absent.h5", "does not exist"]),
        (a_folder, ["not a file"]),
        (text, ["text.h5", "not a readable HDF5 file"]),
        (truncated, ["truncated.h5"]),
        (no_split, ["no split 'train'", "test"]),
        (empty, ["empty"]),
        (three_axes, ["(4, 64, 64)"]),
        (too_few_frames, ["2 frames", "fewer than"]),
        (odd_size, ["60 x 64 pixels", "patches of 32"]),
        (nan_first, ["window 1", "NaN"]),
    ],
)
def test_wrong_data_ends_in_one_sentence_and_leaves_nothing(
    make: Callable[[Path], Path], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pretrain(out, data__path=make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize("workers", rest_but([0], [0, 2]))
def test_bad_values_found_while_training_end_in_one_sentence(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "out", data__path=nan_late(tmp_path), data__num_workers=workers) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "window 30" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mask.ratio=1.2"], ["--mask.ratio is 1.2", "below 1"]),
        (["--mask.ratio=0"], ["nothing to learn"]),
        (["--mask.schedule=linear"], ["--mask.ratio_end"]),
        (["--mask.ratio_end=0.8"], ["--mask.schedule"]),
        (["--data.batch_size=0"], ["--data.batch_size is 0", "at least 1"]),
        (["--data.batch_size=many"], ["--data.batch_size", "int", "many"]),
        (["--data.crop=100"], ["multiple of --model.patch 32"]),
        (["--data.flip=true"], ["--data.path"]),
        (["--data.synthetic_size=100"], ["100 x 100 pixels", "96 x 96 or 128 x 128"]),
        (["--trainer.epochs=0"], ["at least 1"]),
        (["--trainer.epochs=-3"], ["at least 1"]),
        (["--trainer.precision=fp8"], ["fp32", "bf16"]),
        (["--trainer.devices=none"], ["--trainer.devices"]),
        (["--optim.base_lr=nan"], ["--optim.base_lr"]),
        (["--optim.betas=[0.9]"], ["two numbers"]),
        (["--optim.name=sgd"], ["lamb", "adamw"]),
        (["--model.encoder=resnet19"], ["unknown encoder 'resnet19'", "resnet18"]),
        (["--model.encoder=vit_tiny_patch16_224"], ["vit_tiny_patch16_224"]),
        (["--model.backend=cuda"], ["--model.backend", "gather"]),
        (["--model.patch=20"], ["patch"]),
        (["--model.levels=7"], ["levels"]),
        (["--preset=nl51"], ["unknown preset 'nl51'", "nl50-resnet18"]),
        (["--no_such_option=1"], ["no_such_option"]),
        (["--config=/no/such.yaml"], ["/no/such.yaml"]),
        (["--resume"], ["--out"]),
        (["--resume=/no/such.ckpt", "--out=x"], ["/no/such.ckpt", "no such checkpoint"]),
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


@pytest.mark.parametrize("content", ["data: [1, 2", "- a\n- b", "data:\n  colour: red\n", "data:\n  batch_size: x\n"])
def test_wrong_config_files_end_in_one_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(content)
    assert main([f"--config={path}", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert pretrain(tmp_path / "file" / "run") == 2
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert pretrain(tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert pretrain(tmp_path / "closed" / "run") == 2
        assert "no permission" in capsys.readouterr().err


def test_later_wins_defaults_preset_config_command_line(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("data:\n  batch_size: 7\n  num_workers: 3\noptim:\n  clip: 1.0\n")
    argv = ["--data.batch_size=9", "--config", str(path), "--preset=nl50-resnet50"]
    config = parse_pretrain(argv).config
    assert config.data.batch_size == 9, "the command line wins, also before --config"
    assert config.data.num_workers == 3, "the file wins over the preset"
    assert config.model.encoder == "resnet50", "the preset wins over the defaults"
    assert config.mask == PretrainConfig().mask


def test_the_preset_follows_the_data(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("data:\n  path: rain.h5\n")
    assert parse_pretrain([]).preset == "demo"
    assert parse_pretrain(["--data.path=rain.h5"]).preset == "nl50-resnet18"
    assert parse_pretrain([f"--config={path}"]).preset == "nl50-resnet18"
    assert parse_pretrain(["--data.path", "rain.h5", "--preset", "demo"]).preset == "demo"


def test_the_nl50_presets_are_the_settings_of_the_paper() -> None:
    config = parse_pretrain(["--preset=nl50-resnet18"]).config
    optim = config.optim
    assert (optim.name, optim.base_lr, optim.betas, optim.clip) == ("lamb", 2e-4, [0.9, 0.95], 5.0)
    assert (optim.weight_decay, optim.weight_decay_end, optim.warmup_epochs, optim.final_lr) == (0.04, 0.2, 40, 0.001)
    assert (config.data.batch_size, config.data.input_length, config.trainer.epochs) == (128, 12, 1600)
    assert (config.mask.ratio, config.model.patch, config.model.decoder_width) == (0.6, 32, 768)
    assert (config.model.decode_ratio, config.model.decoder_norm) == (1.0, "batch")


@pytest.mark.parametrize("name", [name for name in preset_names(COMMAND.presets) if name.endswith("-fast")])
def test_the_fast_presets_differ_in_what_is_reconstructed_alone(name: str) -> None:
    fast, paper = (to_plain(parse_pretrain([f"--preset={n}"]).config) for n in (name, name.removesuffix("-fast")))
    assert fast["model"].pop("decode_ratio") == DECODE_RATIO
    assert paper["model"].pop("decode_ratio") == 1.0
    assert fast == paper


@pytest.mark.parametrize("name", preset_names(COMMAND.presets))
def test_every_preset_parses_and_prints_a_config_that_goes_back_in(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_pretrain([f"--preset={name}", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    path = tmp_path / "options.yaml"
    path.write_text(printed)
    plain = to_plain(parse_pretrain([f"--preset={name}"]).config)
    assert to_plain(parse_pretrain([f"--config={path}"]).config) == plain
    assert {group: yaml.safe_load(printed)[group] for group in plain} == plain


def test_help_names_options_units_and_defaults() -> None:
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-m", "spatspark_fast.pretrain", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout
    for words in ("--data.path", "--mask.ratio", "time steps of 5 minutes", "in pixels", "(type: int, default: 4)"):
        assert words in shown


def test_the_module_exits_with_the_code() -> None:
    argv = [sys.executable, "-W", "error", "-m", "spatspark_fast.pretrain", "--mask.ratio=1.2"]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 2
    assert shown.stderr == (
        "spatspark-fast: error: --mask.ratio is 1.2: give a share of hidden patches of at least 0 and below 1, "
        "for example 0.6\n"
    )


def test_run_command_maps_ends_to_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def end(error: BaseException) -> Callable[[list[str]], int]:
        def function(argv: list[str]) -> int:
            raise error

        return function

    assert run_command(lambda argv: None) == 0
    assert run_command(end(UserError("two\n lines"))) == 2
    assert capsys.readouterr().err == "spatspark-fast: error: two lines\n"
    assert run_command(end(KeyboardInterrupt())) == 130
    assert run_command(end(RunStopped(15, "saved"))) == 143
    assert run_command(end(BrokenPipeError())) == 141
    capsys.readouterr()
    long = FileNotFoundError(errno.ENAMETOOLONG, "", "a" * 300)
    for error, words in ((long, "give a shorter path"), (MemoryError(), "--data.batch_size")):
        assert run_command(end(error)) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    for word in ("\0", "\ud800"):
        assert run_command(lambda argv: 0, [f"--out={word}"]) == 2
    for defect in (ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "gone"), RuntimeError("odd")):
        with pytest.raises(type(defect)):
            run_command(end(defect))
