"""Windows are read as the file has them, in any process, and wrong files are named."""

import copy
import logging
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset

SIZE = (40, 48)


def images(windows: int, frames: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    rng = np.random.default_rng(windows)
    return rng.gamma(0.3, 0.02, (windows, frames, *size)).astype(np.float32)


def write(path: Path, train: Any, test: Any = None, stamps: Any = None, **attributes: Any) -> Path:
    """Write a file as SmaAt-UNet's scripts do: variable-length strings, gzip 9, h5py's own chunks."""
    with h5py.File(path, "w") as file:
        for split, data in (("train", train), ("test", train if test is None else test)):
            group = file.create_group(split)
            kind = {"maxshape": (None, *data.shape[1:]), "compression": "gzip", "compression_opts": 9}
            group.create_dataset("images", data=data, **kind)
            if stamps is not None:
                group.create_dataset("timestamps", data=stamps, dtype=h5py.special_dtype(vlen=str))
        file.attrs.update(attributes)
    return path


@pytest.mark.parametrize(("frames", "target"), [(18, 6), (24, 12)])
def test_files_that_users_already_have(tmp_path: Path, frames: int, target: int) -> None:
    data = images(5, frames)
    stamps = np.array([[[f"26-AUG-2010;{w:02d}:{t:02d}:00.000"] for t in range(frames)] for w in range(5)], object)
    dataset = NowcastDataset(write(tmp_path / "a.h5", data, stamps=stamps), "test")
    assert len(dataset) == 5
    assert dataset.image_size == SIZE
    assert (dataset.input_length, dataset.output_length) == (12, target)
    for index in (0, 4, -1):
        item = dataset[index]
        assert item["index"] == index % 5
        assert item["input"].dtype == item["target"].dtype == torch.float32
        np.testing.assert_array_equal(torch.cat([item["input"], item["target"]]), data[index])
        assert item["target"].shape == (target, *SIZE)
    assert dataset.timestamps(3)[7] == "26-AUG-2010;03:07:00.000"
    assert dataset.times(3)[7] == datetime(2010, 8, 26, 3, 7)
    assert dataset.valid(2).all()
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize(
    ("asked", "given"), [((6, None), (6, 18)), ((6, 4), (6, 4)), ((12, 0), (12, 0)), ((24, None), (24, 0))]
)
def test_lengths(tmp_path: Path, asked: tuple[int, int | None], given: tuple[int, int]) -> None:
    data = images(2, 24)
    item = NowcastDataset(write(tmp_path / "a.h5", data), input_length=asked[0], output_length=asked[1])[1]
    np.testing.assert_array_equal(item["input"], data[1, : given[0]])
    np.testing.assert_array_equal(item["target"], data[1, given[0] : sum(given)])


def test_timestamps_that_do_not_parse_stay_text(tmp_path: Path) -> None:
    stamps = np.array([[["yesterday"]] * 24, [["26-AUG-2010;00:05:00.000"]] * 24], object)
    dataset = NowcastDataset(write(tmp_path / "a.h5", images(2, 24), stamps=stamps))
    assert dataset.timestamps(0) == ["yesterday"] * 24
    assert dataset.times(0) == [None] * 24
    assert dataset.times(1)[0] == datetime(2010, 8, 26, 0, 5)
    assert NowcastDataset(write(tmp_path / "b.h5", images(2, 24))).timestamps(0) == []


def test_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.h5", images(2, 24))
    with caplog.at_level(logging.WARNING):
        assert NowcastDataset(path).scale == 47.83
    assert "does not say its scale" in caplog.text
    caplog.clear()
    path = write(tmp_path / "a.h5", images(2, 24), scale_mm_per_5min=12.5, source="here")
    dataset = NowcastDataset(path)
    assert (dataset.scale, dataset.attributes["source"]) == (12.5, "here")
    assert not caplog.records
    with pytest.raises(UserError, match="scale_mm_per_5min is -1"):
        NowcastDataset(write(tmp_path / "a.h5", images(2, 24), scale_mm_per_5min=-1.0))


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", images(6, 24))
    options: dict[str, Any] = {"crop": 32, "flip": True, "quarter_turns": True}
    one, two = (NowcastDataset(path, seed=3, **options) for _ in range(2))
    for epoch in (0, 1, 7):
        one.set_epoch(epoch)
        order = np.random.default_rng(epoch).permutation(6)
        first = {i: one[i]["input"] for i in order}  # in another order, and asked twice
        two.set_epoch(epoch)
        for index in range(6):
            assert torch.equal(first[index], two[index]["input"])
            assert torch.equal(first[index], one[index]["input"])
    two.set_epoch(2)
    other = NowcastDataset(path, seed=4, **options)
    other.set_epoch(2)
    one.set_epoch(3)
    for changed in (one, other):
        assert any(not torch.equal(two[i]["input"], changed[i]["input"]) for i in range(6))


def test_augmentation_treats_all_frames_alike_and_loses_nothing(tmp_path: Path) -> None:
    size = (40, 40)
    data = np.arange(np.prod(size), dtype=np.float32).reshape(1, 1, *size) + np.zeros((1, 24, 1, 1), np.float32)
    path = write(tmp_path / "a.h5", data, scale_mm_per_5min=0.01)
    with h5py.File(path, "a") as file:
        file["train/valid"] = data % 7 > 0
    dataset = NowcastDataset(path, flip=True, quarter_turns=True, include_valid=True)
    seen = set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        item = dataset[0]
        frames = torch.cat([item["input"], item["target"]])
        assert (frames == frames[0]).all()
        assert torch.equal(item["valid"], frames % 7 > 0)
        assert torch.equal(frames[0].flatten().sort().values, torch.arange(1600.0))
        seen.add(tuple(frames[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist()))
    assert len(seen) == 8  # the eight symmetries of a square


def test_crops_reach_every_corner(tmp_path: Path) -> None:
    data = np.arange(36, dtype=np.float32).reshape(1, 1, 6, 6) + np.zeros((1, 24, 1, 1), np.float32)
    dataset = NowcastDataset(write(tmp_path / "a.h5", data, scale_mm_per_5min=1.0), crop=(4, 5))
    assert dataset.image_size == (4, 5)
    corners = set()
    for epoch in range(80):
        dataset.set_epoch(epoch)
        frame = dataset[0]["input"][0]
        corner = int(frame[0, 0])
        np.testing.assert_array_equal(frame, data[0, 0, corner // 6 :, corner % 6 :][:4, :5])
        corners.add(corner)
    assert corners == {0, 1, 6, 7, 12, 13}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.rest)])
def test_workers_read_what_the_parent_reads(tmp_path: Path, method: str) -> None:
    data = images(12, 24)
    dataset = NowcastDataset(write(tmp_path / "a.h5", data), crop=32, flip=True)
    dataset[0]  # the parent's handle is open when a worker is forked
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    for epoch in (0, 5):  # workers that live on must see the epoch of the parent
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(12))
        inputs = torch.cat([batch["input"] for batch in batches])
        assert torch.equal(inputs, torch.stack([dataset[i]["input"] for i in range(12)]))


def test_pickled_and_copied_data_sets_read(tmp_path: Path) -> None:
    dataset = NowcastDataset(write(tmp_path / "a.h5", images(3, 24)), crop=32)
    dataset.set_epoch(4)
    dataset[0]
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert torch.equal(twin[2]["input"], dataset[2]["input"])
    dataset.close()
    dataset[1]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4000])


def _without(name: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file[name]

    return remove


def _with(data: np.ndarray) -> Callable[[Path], None]:
    return lambda path: write(path, data) and None


@pytest.mark.parametrize(
    ("spoil", "options", "word"),
    [
        (lambda path: path.unlink(), {}, "does not exist"),
        (lambda path: (path.unlink(), path.mkdir()), {}, "is not a file"),
        (lambda path: path.write_bytes(b""), {}, "not a readable HDF5 file"),
        (lambda path: path.write_text("hello"), {}, "not a readable HDF5 file"),
        (_truncate, {}, "is truncated"),
        (_without("train"), {}, "has no split 'train'; it holds test"),
        (lambda path: None, {"split": "valid"}, "has no split 'valid'; it holds test, train"),
        (_without("train/images"), {}, "no data set train/images"),
        (_with(np.zeros((9, 20, 20), np.float32)), {}, r"shape \(9, 20, 20\)"),
        (_with(np.zeros((2, 24, 20, 20), np.uint8)), {}, "uint8"),
        (_with(np.zeros((0, 24, 20, 20), np.float32)), {}, "split 'train' is empty"),
        (lambda path: None, {"input_length": 25}, r"24 frames, fewer than 25"),
        (lambda path: None, {"output_length": 13}, r"24 frames, fewer than 12 \+ 13"),
        (lambda path: None, {"input_length": 0}, "input_length must be at least 1"),
        (lambda path: None, {"output_length": -1}, "output_length must be 0 or more"),
        (lambda path: None, {"crop": 64}, r"crop \(64, 64\) does not fit into images of 40 x 48"),
        (lambda path: None, {"quarter_turns": True}, "quarter_turns needs square images, not 40 x 48"),
    ],
)
def test_wrong_files_are_named_when_opened(tmp_path: Path, spoil, options: dict, word: str) -> None:
    path = write(tmp_path / "a.h5", images(2, 24), scale_mm_per_5min=1.0)
    spoil(path)
    with pytest.raises(UserError, match=word) as caught:
        NowcastDataset(path, **options)
    assert "\n" not in str(caught.value)
    assert "a.h5" in str(caught.value) or "length" in str(caught.value)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "not finite"), (np.inf, "not finite"), (-0.1, "negative")])
def test_wrong_values_are_named_when_read(tmp_path: Path, value: float, word: str) -> None:
    data = images(3, 24)
    data[1, 20, 5, 5] = value
    dataset = NowcastDataset(write(tmp_path / "a.h5", data))
    dataset[0]
    with pytest.raises(UserError, match=rf"a\.h5, train window 1 holds .*{word}"):
        dataset[1]
    assert NowcastDataset(tmp_path / "a.h5", output_length=6)[1]["target"].shape[0] == 6  # not in these frames


def test_a_damaged_chunk_is_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        kind: dict[str, Any] = {"chunks": (1, 24, *SIZE), "compression": "gzip"}
        data = file.create_dataset("train/images", data=images(3, 24), **kind)
        place = data.id.get_chunk_info(2)
    with open(path, "r+b") as raw:
        raw.seek(place.byte_offset + 100)
        raw.write(b"\0" * 2000)
    dataset = NowcastDataset(path)
    dataset[1]
    with pytest.raises(UserError, match="train window 2: images cannot be read"):
        dataset[2]
