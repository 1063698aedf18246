"""The command forecast: files, ONNX, and refusals in one sentence."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from spatspark_fast.forecast.__main__ import main
from spatspark_fast.models.registry import load_forecaster
from tests.forecast.forecasts import SMALL, moving_rain, save_checkpoint, write_windows
from tests.matrix import rest_but
from tests.prepare.archives import write_archive
from tests.refusals import refusal


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_windows(tmp_path_factory.mktemp("data") / "windows.h5", moving_rain(2, 7, 40, 72))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "model.ckpt", "persistence", lengths=(4, 3))


def test_the_command_writes_what_it_says(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_checkpoint(tmp_path / "m.ckpt", lengths=(4, 3))
    argv = ["--checkpoint", str(checkpoint), "--data.path", str(file), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    names = {f"forecast_20200601T1330Z.{kind}" for kind in ("nc", "gif", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert "2020-06-01 13:30 UTC, 15 minutes" in shown.out
    with xr.open_dataset(tmp_path / "out" / "forecast_20200601T1330Z.nc") as data:
        assert data["rainfall_rate"].shape == (3, 40, 72)
        assert data["rainfall_rate"].values.min() >= 0
        assert "test model" in data.attrs["source"]


def test_every_window_many_steps_and_names(file: Path, checkpoint: Path, tmp_path: Path) -> None:
    argv = ["--checkpoint", f"the last frame={checkpoint}", "--data.path", str(file), "--out", str(tmp_path / "out")]
    assert main([*argv, "--start", "every", "--steps", "8"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "forecast_20200601T1215Z.nc",
        "forecast_20200601T1315Z.nc",
    }
    rates = moving_rain(2, 7, 40, 72)
    with xr.open_dataset(tmp_path / "out" / "forecast_20200601T1315Z.nc") as data:
        assert data["rainfall_rate"].shape == (8, 40, 72)
        assert np.allclose(data["rainfall_rate"].values[7], rates[1, 3], atol=1e-4)
        assert "the last frame" in data.attrs["source"]


def test_raw_files_of_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_archive(tmp_path / "raw", list(range(6)))
    argv = ["--checkpoint", str(checkpoint), "--data.path", str(folder), "--crop", "0:48,0:40"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--pictures", "false"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["forecast_20160701T0025Z.nc"]
    capsys.readouterr()
    gap = write_archive(tmp_path / "gap", [0, 1, 2, 5])
    argv[3] = str(gap)
    assert "without a gap" in refusal(capsys, main, [*argv, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_wrong_options(file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--checkpoint", str(checkpoint)]
    data = [*model, "--data.path", str(file), "--out", str(tmp_path / "out")]
    for argv, word in (
        ([], "checkpoint"),
        (model, "nothing to do"),
        ([*model, "--data.path", str(file)], "--out is missing"),
        ([*data, "--start", "tomorrow"], "--start 'tomorrow'"),
        ([*data, "--start", "2020-06-01T09:00"], "no window has 4 frames"),
        ([*data, "--steps", "0"], "--steps is 0"),
        ([*data, "--data.split", "train"], "no split 'train'"),
        ([*data, "--device", "abacus"], "--device abacus"),
        ([*data, "--crop", "0:8,0:8"], "--crop is 0:8,0:8: it means nothing for a file of windows"),
        ([*data, "--stride", "2", "--start", "every"], "--stride is 2: it means nothing for a file of windows"),
        ([*data, "--data.path", str(tmp_path), "--data.split", "train"], "it means nothing for a folder"),
        ([*data, "--data.path", str(tmp_path), "--stride", "2"], "it means nothing without --start every"),
        ([*model, "--export", str(tmp_path / "x.onnx"), "--steps", "3"], "it means nothing without --data.path"),
        ([*data, "--data.path", "/no/such"], "/no/such does not exist"),
        ([*data, "--data.path", str(tmp_path)], "say by --source"),
        ([*data, "--data.path", str(tmp_path), "--source", "mch"], "no file ending in .gif"),
        ([*data, "--checkpoint", str(file)], "no checkpoint of finetune"),
        ([*data, "--export", "/no/folder/x.onnx"], "/no/folder/x.onnx"),
        ([*data, "--colour", "red"], "colour"),
    ):
        assert word in refusal(capsys, main, argv), argv
    assert not (tmp_path / "out").exists()


def test_wrong_files(file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--data.path"]
    cut = tmp_path / "cut.h5"
    cut.write_bytes(file.read_bytes()[:5000])
    assert "truncated" in refusal(capsys, main, [*argv, str(cut)])
    rates = moving_rain(1, 7, 16, 16)
    rates[0, 5, 3, 4] = np.nan
    assert "NaN" in refusal(capsys, main, [*argv, str(write_windows(tmp_path / "nan.h5", rates))])
    short = write_windows(tmp_path / "short.h5", moving_rain(1, 3, 16, 16))
    assert "3 frames" in refusal(capsys, main, [*argv, str(short)])
    pretrained = tmp_path / "pretrained.ckpt"
    torch.save({"config": {"mask": {}}, "state_dict": {}}, pretrained)
    argv[1] = str(pretrained)
    assert "python -m spatspark_fast.finetune" in refusal(capsys, main, [*argv, str(file)])


def test_help_has_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("mm/h", "frames of 5 minutes", "pixels", "UTC", "default: newest"):
        assert words in text


@pytest.mark.parametrize("decoder", rest_but(["light"], ["light", "unet"]))  # the exporter takes half a minute
def test_onnx_gives_the_same_forecast_at_other_sizes(decoder: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f'no {package}: pip install "spatspark-fast[onnx]"')
    import onnxruntime

    options = {**SMALL, "decoder": decoder, "output_norm": "input_patch", "translation": "attention"}
    checkpoint = save_checkpoint(tmp_path / "m.ckpt", lengths=(4, 3), **options)
    model = tmp_path / "m.onnx"
    assert main(["--checkpoint", str(checkpoint), "--export", str(model)]) == 0
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    rates = moving_rain(3, 4, 96, 64)
    loaded = load_forecaster(checkpoint)
    expected = loaded.model.predict(torch.from_numpy(rates / 12 / loaded.scale)) * 12 * loaded.scale
    found = session.run(None, {"rates": rates})[0]
    assert isinstance(found, np.ndarray)
    assert expected.max() > 0.01
    assert np.abs(found - expected.numpy()).max() < 1e-4 * float(expected.max())
    about = session.get_modelmeta().custom_metadata_map
    assert (about["in_length"], about["multiple_of_pixels"], about["interval_minutes"]) == ("4", "32", "5")
    assert "mm/h" in about["input"]


def test_export_without_onnx_says_what_to_install(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    argv = ["--checkpoint", str(checkpoint), "--export", str(tmp_path / "m.onnx")]
    assert 'pip install "spatspark-fast[onnx]"' in refusal(capsys, main, argv)
    (tmp_path / "m.onnx").touch()
    assert "exists already" in refusal(capsys, main, argv)
