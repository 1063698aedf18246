"""The command says what was wrong in one sentence and exits with 2, or tells what it did."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from spatspark_fast.prepare.__main__ import main
from tests.prepare.archives import START, rain_pixels, write_archive, write_knmi
from tests.refusals import refusal


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"), list(range(12)))


def options(archive: Path, out: Path, *more: str) -> list[str]:
    few = ["--data.input_length", "3", "--data.output_length=2", "--crop", "0:48,0:40"]
    return ["--source", "knmi", "--data.path", str(archive), "--out", str(out), *few, *more]


def test_success_prints_a_summary(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(archive, tmp_path / "out.h5")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "12 read, 0 gaps" in captured.out
    assert "windows kept" in captured.out
    assert (tmp_path / "out.h5").exists()


def test_underscores_and_dashes_are_the_same(archive: Path, tmp_path: Path) -> None:
    assert main([*options(archive, tmp_path / "a.h5"), "--wet_fraction", "0.1"]) == 0
    assert main([*options(archive, tmp_path / "a.h5"), "--wet-fraction=0.1", "--overwrite"]) == 0


def test_help_has_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--wet_fraction" in text
    assert "default: 0.5" in text
    assert "mm/h" in text
    assert "mm per 5 min" in text


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--crop", "1:2"], "--crop '1:2'"),
        (["--crop", "0:49,0:40"], "outside the image of 48 rows and 40 columns"),
        (["--stride", "two"], "stride"),
        (["--stride", "0"], "--stride"),
        (["--data.input_length", "0"], "--data.input_length"),
        (["--wet_fraction", "50"], "--wet_fraction"),
        (["--wet_rule", "never"], "wet_rule"),
        (["--interval_minutes", "0"], "--interval_minutes"),
        (["--interval_minutes", "1"], "--interval_minutes"),
        (["--test_fraction", "2"], "--test_fraction"),
        (["--test_from", "tomorrow"], "--test_from 'tomorrow'"),
        (["--scale", "0"], "--scale"),
        (["--data.num_workers", "-1"], "--data.num_workers"),
        (["--data.output_length", "20"], "--data.output_length"),
        (["--data.output_length", "3000000000"], "4 GiB"),
        (["--wet_fraction", "0.99"], "lower --wet_fraction"),
        (["--pattern", "*.gif"], "no file matching '*.gif'"),
        (["--source", "mch"], "no file ending in .gif"),
        (["--source", "mch", "--pattern", "*.h5"], "none of the 12 files"),
        (["--time_format", "%Y"], "--time_format"),
        (["--data.path", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["--out", "/no/such/folder/x.h5"], "/no/such/folder does not exist"),
        (["--no-such-option", "1"], "no_such_option"),
    ],
)
def test_wrong_options(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], word: str
) -> None:
    assert word in refusal(capsys, main, options(archive, tmp_path / "out.h5", *more))
    assert list(tmp_path.iterdir()) == []


def test_nothing_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "source" in refusal(capsys, main, [])


def test_wrong_places(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder" in refusal(capsys, main, options(archive, tmp_path))
    (tmp_path / "empty").mkdir()
    assert "has no file ending in .h5" in refusal(capsys, main, options(tmp_path / "empty", tmp_path / "out.h5"))
    (tmp_path / "out.h5").touch()
    assert "exists already" in refusal(capsys, main, options(archive, tmp_path / "out.h5"))


def test_an_archive_of_one_kind_of_trouble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.h5"
    folder.mkdir()
    whole = write_knmi(folder / "a.h5", START, rain_pixels(0))
    (folder / "a.h5").write_bytes(whole.read_bytes()[:2000])
    assert "none of the 1 files" in refusal(capsys, main, options(folder, out))
    write_knmi(folder / "a.h5", START, rain_pixels(0), minutes=60)
    assert "accumulated over 60 minutes" in refusal(capsys, main, options(folder, out))
    write_knmi(folder / "a.h5", START, rain_pixels(0), formula="GEO=?")
    assert "calibration formula" in refusal(capsys, main, options(folder, out))
    for step in range(6):
        write_knmi(folder / f"{step}.h5", START + timedelta(minutes=5 * step), rain_pixels(0) * 0 + 65535)
    (folder / "a.h5").unlink()
    assert "--min_valid" in refusal(capsys, main, options(folder, out))
    for step in range(6):
        write_knmi(folder / f"{step}.h5", START + timedelta(minutes=10 * step), rain_pixels(0))
    assert "5 gaps" in refusal(capsys, main, options(folder, out))
    assert not out.exists()


def test_the_command_itself(archive: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "spatspark_fast.prepare"]
    argv = options(archive, tmp_path / "out.h5")
    done = subprocess.run([*command, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    again = subprocess.run([*command, *argv], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert len(again.stderr.splitlines()) == 1
