"""A part of the windows is held out by time, and shares no frame with the others."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.radar.timestamps import format_timestamp
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.finetune.windows import hold_out

START = datetime(2016, 7, 1)


def write(path: Path, starts: list[int], frames: int = 6, times: bool = True) -> NowcastDataset:
    """Write windows that start so many frames after `START`, and open them as 3 + 3 frames."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["train/images"] = rng.random((len(starts), frames, 32, 32), dtype=np.float32)
        valid = np.ones((len(starts), frames, 32, 32), dtype=bool)
        valid[0, :, 4:9, 20:] = False
        file["train/valid"] = valid
        if times:
            stamps = [
                [format_timestamp(START + timedelta(minutes=5 * (start + t))) for t in range(frames)]
                for start in starts
            ]
            file["train/timestamps"] = np.array(stamps, dtype="S24")[..., None]
        file.attrs["scale_mm_per_5min"] = 47.83
    return NowcastDataset(path, "train", 3, 3, include_valid=True)


def test_the_newest_windows_are_held_out_and_no_frame_is_on_both_sides(tmp_path: Path) -> None:
    starts = [0, 1, 2, 3, 20, 21, 30, 31, 32, 33]
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]  # the file is not in order of time
    split = hold_out(write(tmp_path / "a.h5", [starts[i] for i in order]), 0.2)
    held = sorted(starts[order[i]] for i in split.validation)
    trained = sorted(starts[order[i]] for i in split.train)
    assert held == [32, 33]
    assert trained == [0, 1, 2, 3, 20, 21]  # 30 and 31 have frames that 32 has
    assert split.dropped == 2
    assert split.timed
    frames = [{start + t for start in part for t in range(6)} for part in (held, trained)]
    assert not frames[0] & frames[1]


def test_without_times_the_order_of_the_file_counts(tmp_path: Path) -> None:
    split = hold_out(write(tmp_path / "a.h5", list(range(40)), times=False), 0.1)
    assert split.validation == [36, 37, 38, 39]
    assert split.train == list(range(31))
    assert (split.dropped, split.timed) == (5, False)


def test_nothing_may_be_held_out(tmp_path: Path) -> None:
    split = hold_out(write(tmp_path / "a.h5", [0, 1, 2]), 0.0)
    assert (split.train, split.validation, split.dropped) == ([0, 1, 2], [], 0)


def test_one_run_of_rain_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of 5 windows none is left to train on.*--data.validation_fraction 0"):
        hold_out(write(tmp_path / "a.h5", [0, 1, 2, 3, 4]), 0.4)


def test_made_up_windows_have_days_of_their_own() -> None:
    split = hold_out(SyntheticRadar(10, 3, 3, 32), 0.25)
    assert (split.train, split.validation, split.dropped) == (list(range(8)), [8, 9], 0)
