"""The command evaluate: what it writes, what it says, and how it refuses."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatspark_fast.evaluate.__main__ import main
from spatspark_fast.evaluate.report import lead_time_table, overall_table, split_name
from tests.forecast.forecasts import moving_rain, save_checkpoint, write_windows
from tests.refusals import refusal


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_windows(tmp_path_factory.mktemp("data") / "windows.h5", moving_rain(3, 7, 64, 96))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "model.ckpt", lengths=(4, 3), name="tiny")


def test_everything_is_written_and_agrees(
    file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["--checkpoint", str(checkpoint), "--checkpoint", f"again={checkpoint}", "--data.path", str(file)]
    assert main([*argv, "--out", str(out), "--thresholds", "0.5", "200"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    names = {path.name for path in out.iterdir()}
    assert names >= {"scores.json", "scores.csv", "scores.md", "lead_times.png", "spectra.png", "panel_00001.png"}
    content = json.loads((out / "scores.json").read_text())
    assert list(content["models"]) == ["tiny", "again", "persistence"]
    assert content["models"]["tiny"]["all"] == content["models"]["again"]["all"]
    persistence = content["models"]["persistence"]
    assert persistence["lead_minutes"] == [5, 10, 15]
    assert persistence["by_lead_time"]["precision@200"] == [None] * 3  # nothing is that heavy
    with (out / "scores.csv").open() as rows:
        table = {
            (row["model"], row["lead_minutes"], row["score"], row["threshold_mm_per_hour"], row["scale_pixels"]): row
            for row in csv.DictReader(rows)
        }
    csi = table["persistence", "10", "csi", "0.5", ""]
    assert float(csi["value"]) == pytest.approx(persistence["by_lead_time"]["csi@0.5"][1], rel=1e-6)
    assert table["tiny", "all", "pmse", "", ""]["units"] == "(mm/5min)^2"
    assert float(table["persistence", "all", "fss", "0.5", "15"]["value"]) > 0.9
    assert table["persistence", "all", "precision", "200", ""]["value"] == ""
    assert "| persistence |" in (out / "scores.md").read_text()
    assert "| persistence |" in shown.out
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 15, picture


def test_optical_flow_stands_beside_or_says_what_is_missing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--data.path", str(file), "--out", str(tmp_path / "out"), "--baselines", "persistence", "extrapolation"]
    argv += ["--panels", "0", "--fss_scales"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        assert 'pip install "spatspark-fast[radar]"' in refusal(capsys, main, argv)
    pytest.importorskip("pysteps", reason='no pysteps: pip install "spatspark-fast[radar]"')
    pytest.importorskip("cv2", reason='no OpenCV: pip install "spatspark-fast[radar]"')
    assert main(argv) == 0
    models = json.loads((tmp_path / "out" / "scores.json").read_text())["models"]
    assert models["extrapolation"]["all"]["pmse"] < models["persistence"]["all"]["pmse"]
    assert not any(key.startswith("fss") for key in models["extrapolation"]["all"])


def test_a_window_without_rain(tmp_path: Path) -> None:
    dry = write_windows(tmp_path / "dry.h5", np.zeros((1, 5, 32, 32), np.float32))
    assert main(["--data.path", str(dry), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["models"]["persistence"]["all"]
    assert found["csi@0.5"] is None
    assert found["accuracy@0.5"] == 1.0


def test_wrong_options(file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data.path", str(file), "--out", str(tmp_path / "out")]
    for more, word in (
        (["--baselines"], "nothing to score"),
        (["--baselines", "radar"], "--baselines: expected value of ['persistence', 'extrapolation'], got radar"),
        (["--data.split", "train"], "no split 'train'"),
        (["--thresholds", "-1"], "--thresholds"),
        (["--fss_scales", "0"], "--fss_scales"),
        (["--steps", "9"], "--steps 9"),
        (["--steps", "0"], "--steps is 0"),
        (["--data.batch_size", "0"], "--data.batch_size is 0"),
        (["--panels", "-1"], "--panels"),
        (["--region", "moon"], "region"),
        (["--device", "abacus"], "--device abacus"),
        (["--checkpoint", str(checkpoint), "--tile", "40"], "--tile is 40"),
        (["--checkpoint", "/no/such.ckpt"], "/no/such.ckpt"),
        (["--checkpoint", str(file)], "no checkpoint of finetune"),
        (["--data.path", "/no/such.h5"], "/no/such.h5"),
        (["--colour", "red"], "colour"),
    ):
        assert word in refusal(capsys, main, [*base, *more]), more
    assert not (tmp_path / "out").exists()


def test_wrong_files(file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    cut = tmp_path / "cut.h5"
    cut.write_bytes(file.read_bytes()[:5000])
    assert "truncated" in refusal(capsys, main, ["--data.path", str(cut), *out])
    rates = moving_rain(1, 7, 32, 32)
    rates[0, 2, 3, 4] = math.nan
    assert "NaN" in refusal(capsys, main, ["--data.path", str(write_windows(tmp_path / "nan.h5", rates)), *out])
    short = write_windows(tmp_path / "short.h5", moving_rain(1, 3, 32, 32))
    assert "3 frames" in refusal(capsys, main, ["--data.path", str(short), *out])
    weights = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, weights)
    assert "does not describe a forecaster" in refusal(
        capsys, main, ["--data.path", str(file), "--out", str(tmp_path / "out"), "--checkpoint", str(weights)]
    )
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thing").touch()
    assert "is not empty" in refusal(capsys, main, ["--data.path", str(file), "--out", str(taken)])
    assert "is a file" in refusal(capsys, main, ["--data.path", str(file), "--out", str(taken / "thing")])


def test_help_has_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("mm/h", "pixels", "default: 4", "frames of 5 minutes"):
        assert words in text


def test_tables_mark_the_best_and_leave_out_what_is_undefined() -> None:
    scores = {
        name: {
            "lead_minutes": [5, 10],
            "thresholds_mm_per_hour": [1.0],
            "all": {"pmse": pmse, "mean_error": error, "csi@1": csi},
            "by_lead_time": {"csi@1": [csi, math.nan]},
        }
        for name, pmse, error, csi in (("a|b", 0.002, -0.3, 0.5), ("c", 0.001, 0.4, math.nan))
    }
    assert overall_table(scores)[2:] == ["| a/b | 0.002 | **-0.300** | **0.500** |", "| c | **0.001** | 0.400 | - |"]
    assert lead_time_table(scores, "csi@1")[2:] == ["| a/b | **0.500** | - |", "| c | - | - |"]
    assert split_name("fss@0.5/15") == ("fss", 0.5, 15)
    assert split_name("pmse") == ("pmse", None, None)
