"""Windows as one stack: past and future, pixels without data, and made-up windows that are made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.data.windows import WholeWindows

MISSING = (slice(4, 9), slice(20, None))


def write(path: Path, windows: int = 3, valid: bool = True) -> Path:
    """Write windows of 6 frames; the first has pixels without data, if the file says so."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["train/images"] = rng.random((windows, 6, 32, 32), dtype=np.float32)
        if valid:
            known = np.ones((windows, 6, 32, 32), dtype=bool)
            known[(0, slice(None), *MISSING)] = False
            file["train/valid"] = known
        file.attrs["scale_mm_per_5min"] = 47.83
    return path


def open_file(path: Path, **options: Any) -> WholeWindows:
    return WholeWindows(NowcastDataset(path, "train", 3, 3, include_valid=True, **options))


def test_the_future_is_nan_where_nothing_was_measured_and_the_past_is_as_in_the_file(tmp_path: Path) -> None:
    windows = open_file(write(tmp_path / "a.h5"))
    assert len(windows) == 3
    item = windows[0]
    assert item["index"] == 0
    stack = item["input"]
    assert stack.shape == (6, 32, 32)
    with h5py.File(tmp_path / "a.h5") as file:
        images: h5py.Dataset = file["train/images"]  # pyright: ignore[reportAssignmentType]
        stored = torch.from_numpy(images[0])
    missing = torch.zeros(32, 32, dtype=torch.bool)
    missing[MISSING] = True
    past, future = stack[: windows.past], stack[windows.past :]
    assert torch.equal(past, stored[:3])
    assert torch.equal(future.isnan(), missing.expand(3, -1, -1))
    assert torch.equal(future[:, ~missing], stored[3:][:, ~missing])
    assert not windows[1]["input"].isnan().any()


def test_missing_pixels_turn_with_the_picture(tmp_path: Path) -> None:
    windows = open_file(write(tmp_path / "a.h5", windows=1), flip=True, quarter_turns=True)
    shapes = set()
    for epoch in range(8):
        windows.set_epoch(epoch)
        rows, columns = torch.nonzero(windows[0]["input"][5].isnan(), as_tuple=True)
        assert len(rows) == 5 * 12
        shapes.add((int(rows.min()), int(columns.min())))
    assert len(shapes) > 3


@pytest.mark.parametrize("valid", [True, False])
def test_untreated_windows_are_those_without_augmentation(tmp_path: Path, valid: bool) -> None:
    path = write(tmp_path / "a.h5", valid=valid)
    plain, treated = open_file(path), open_file(path, crop=16, flip=True, quarter_turns=True)
    assert plain.gaps == treated.gaps == valid
    for index in range(3):
        expected = plain[index]["input"]
        assert expected.isnan().any() == (valid and index == 0)
        for windows in (plain, treated):
            np.testing.assert_array_equal(windows.untreated(index), expected.numpy())


def test_windows_without_frames_to_come_have_no_gaps(tmp_path: Path) -> None:
    data = NowcastDataset(write(tmp_path / "a.h5"), "train", 3, 0, include_valid=True)
    windows = WholeWindows(data)
    assert not windows.gaps
    assert windows[0]["input"].shape == windows.untreated(0).shape == (3, 32, 32)
    assert not windows[0]["input"].isnan().any()


def test_made_up_windows_are_made_once() -> None:
    windows = WholeWindows(SyntheticRadar(3, 2, 2, 32))
    assert windows[1] is windows[1]
    for index in (1, 2):
        np.testing.assert_array_equal(windows.untreated(index), windows[index]["input"].numpy())
