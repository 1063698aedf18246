"""Several prepared files in one: every window once, no test window in training, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.prepare.__main__ import main
from spatspark_fast.prepare.merging import merge_files
from tests.forecast.forecasts import moving_rain, write_windows
from tests.refusals import refusal


def prepared(path: Path, train: int, test: int, seed: int, **options: float) -> Path:
    """Write a file with both splits, some of whose pixels have no data; a split may be empty."""
    for split, count in (("train", train), ("test", test)):
        rates = moving_rain(max(count, 1), 4, 32, 32, seed=seed + (split == "test"))[:count]
        part = write_windows(path.with_suffix(f".{split}"), rates, split=split, missing=rates > 8, **options)
        with h5py.File(part) as source, h5py.File(path, "a") as target:
            source.copy(split, target)
            target.attrs.update(source.attrs)
    return path


def read(path: Path, split: str, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file[f"{split}/{name}"])


def test_windows_of_all_files_train_and_those_of_the_first_test(tmp_path: Path) -> None:
    first = prepared(tmp_path / "a.h5", 3, 2, seed=1)
    second = prepared(tmp_path / "b.h5", 2, 1, seed=5)
    out = tmp_path / "all.h5"
    assert merge_files([first, second], out) == {"train": 5, "test": 2}
    for name in ("images", "valid", "timestamps"):
        expected = np.concatenate((read(first, "train", name), read(second, "train", name)))
        assert np.array_equal(read(out, "train", name), expected)
        assert np.array_equal(read(out, "test", name), read(first, "test", name))
    assert not read(out, "train", "valid").all()
    windows = NowcastDataset(out, "train", 2, include_valid=True)
    assert (len(windows), windows.scale, windows[4]["target"].shape) == (5, 47.83, (2, 32, 32))


def test_synthetic_windows_join_those_that_train_in_the_scale_of_the_file(tmp_path: Path) -> None:
    file = prepared(tmp_path / "a.h5", 2, 1, seed=1)
    with h5py.File(file, "a") as opened:
        opened.attrs["scale_mm_per_5min"] = 2 * 47.83
    out = tmp_path / "more.h5"
    assert merge_files([file], out, synthetic=3, seed=7) == {"train": 5, "test": 1}
    radar = SyntheticRadar(3, 4, 0, (32, 32), seed=7)
    images, valid = read(out, "train", "images"), read(out, "train", "valid")
    for index in range(3):
        np.testing.assert_allclose(images[2 + index], radar[index]["input"].numpy() / 2, rtol=1e-6)
        assert read(out, "train", "timestamps")[2 + index, :, 0].tolist() == [
            time.encode() for time in radar.timestamps(index)
        ]
    assert valid[2:].all()
    assert np.array_equal(images[:2], read(file, "train", "images"))
    assert len(NowcastDataset(out, "train", 2)) == 5


def test_a_country_left_out_tests_with_all_it_has(tmp_path: Path) -> None:
    files = [prepared(tmp_path / f"{name}.h5", 2, 0, seed) for seed, name in enumerate("abc")]
    out = tmp_path / "without-c.h5"
    assert merge_files(files[:2], out, test=files[2]) == {"train": 4, "test": 2}
    assert np.array_equal(read(out, "test", "images"), read(files[2], "train", "images"))
    with pytest.raises(UserError, match="are trained on"):
        merge_files(files, tmp_path / "leak.h5", test=files[2])
    assert not (tmp_path / "leak.h5").exists()


def test_files_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    first = prepared(tmp_path / "a.h5", 2, 1, seed=1)
    (tmp_path / "text.h5").write_text("no archive")
    other = prepared(tmp_path / "scale.h5", 2, 1, seed=2, scale=30.0)
    small = write_windows(tmp_path / "small.h5", moving_rain(1, 4, 32, 48), split="train")
    foreign, empty = prepared(tmp_path / "foreign.h5", 2, 1, seed=3), tmp_path / "empty.h5"
    with h5py.File(foreign, "a") as file:
        del file["train/valid"]
    h5py.File(empty, "w").close()
    for wrong, words in (
        (tmp_path / "text.h5", "is not a readable HDF5 file"),
        (tmp_path / "absent.h5", "does not exist"),
        (other, "one --scale"),
        (small, "has windows of"),
        (foreign, "has no train/valid"),
        (empty, "has no attribute scale_mm_per_5min"),
    ):
        with pytest.raises(UserError, match=words):
            merge_files([first, wrong], tmp_path / "all.h5")
    with pytest.raises(UserError, match=r"--data\.synthetic_windows is -1"):
        merge_files([first], tmp_path / "all.h5", synthetic=-1)
    assert not (tmp_path / "all.h5").exists()


def test_a_damaged_window_is_named(tmp_path: Path) -> None:
    file = prepared(tmp_path / "a.h5", 2, 1, seed=1)
    with h5py.File(file, "a") as opened:
        images = np.asarray(opened["train/images"])
        del opened["train/images"]
        packed = opened.create_dataset("train/images", data=images, chunks=(1, *images.shape[1:]), compression="gzip")
        packed.id.write_direct_chunk((1, 0, 0, 0), b"no gzip stream")
    with pytest.raises(UserError, match=r"a\.h5, train window 1: images cannot be read"):
        merge_files([file], tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()


def test_the_command_merges_and_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [prepared(tmp_path / f"{name}.h5", 2, 1, seed) for seed, name in enumerate("abc")]
    out = tmp_path / "all.h5"
    argv = ["--merge", *map(str, files[:2]), "--out", str(out), "--data.synthetic-windows", "1"]
    assert main([*argv, "--test-file", str(files[2])]) == 0
    assert capsys.readouterr().out == f"{out}: 5 training windows, 1 test windows\n"
    assert np.array_equal(read(out, "test", "images"), read(files[2], "test", "images"))
    assert "exists already" in refusal(capsys, main, argv)
    assert main([*argv, "--overwrite"]) == 0
    assert np.array_equal(read(out, "test", "images"), read(files[0], "test", "images"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--merge", "a.h5", "--wet_fraction=0.9"], "--wet_fraction means nothing with --merge"),
        (["--merge", "a.h5", "--data.path=radar"], "--data.path means nothing with --merge"),
        (["--merge", "a.h5", "--data.synthetic_windows=-1"], "--data.synthetic_windows is -1"),
        (["--merge"], "merge"),
        (["--source=knmi", "--data.path=radar", "--test_file=b.h5"], "--test_file means nothing without --merge"),
        (["--source=knmi"], "--data.path is missing"),
        ([], "--source is missing"),
    ],
)
def test_options_that_do_not_go_together(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, main, [*argv, f"--out={tmp_path / 'all.h5'}"])
    assert list(tmp_path.iterdir()) == []
