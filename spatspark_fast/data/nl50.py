"""Read windows of radar rain from HDF5 files in the layout of NL-50."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.hdf5 import BROKEN, open_hdf5, read_row, why
from spatspark_fast.data.layout import find_split, interval_of, read_attributes, scale_of
from spatspark_fast.data.radar.timestamps import parse_timestamp

__all__ = ["NowcastDataset"]

LARGEST_DEPTH = 1000.0  # mm in 5 minutes, five times what the heaviest minute ever measured (38 mm) would make


class NowcastDataset(Dataset[dict[str, Any]]):
    """Serve the windows of one split of a file of ``prepare``, SmaAt-UNet or SpaT-SparK.

    An item is ``{"input": (T_in, H, W) float32, "target": (T_out, H, W) float32, "index": int}``, values =
    rain in mm per 5 min / ``scale``; with ``include_valid`` also ``"valid": (T_in + T_out, H, W) bool``. The
    input are the first ``input_length`` frames of a window, the target the ``output_length`` frames after
    them (None = all others; 0 = none).

    ``crop`` (pixels, one number or height and width) cuts at random, ``flip`` mirrors rows and columns,
    ``quarter_turns`` turns: each a pure function of (``seed``, epoch, index), see ``set_epoch``.

    The file is opened by each process on first use, so workers may be forked or spawned, and the data set
    pickled.

    Raises:
        UserError: the file is missing, truncated, locked or not HDF5, has no such split or no windows in it, is not
            in the layout (see `find_split`), or its windows are too short or too small; and, when it is read, a
            window that cannot be unpacked or holds NaN, infinite, negative values, or more rain than there can be.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        input_length: int = 12,
        output_length: int | None = None,
        crop: int | tuple[int, int] | None = None,
        flip: bool = False,
        quarter_turns: bool = False,
        seed: int = 0,
        include_valid: bool = False,
    ) -> None:
        self.path = Path(path)
        self.split = split
        self.include_valid = include_valid
        self._augmentation = Augmentation((crop, crop) if isinstance(crop, int) else crop, flip, quarter_turns, seed)
        # In shared memory: workers that live on over epochs see what the main process sets.
        self._shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._worker_epoch: int | None = None
        self._file: h5py.File | None = None
        self._pid = -1
        with open_hdf5(self.path) as file:
            found = find_split(file, self.path, split)
            self._length, frames, height, width = (int(length) for length in found.images.shape)
            self._stored_frames = frames
            self._has = {"valid": found.valid is not None, "timestamps": found.timestamps is not None}
            self.attributes = read_attributes(file, self.path)
        self.stored_size = (height, width)
        self.input_length = input_length
        self.output_length = frames - input_length if output_length is None else output_length
        self._check_lengths(frames)
        try:
            self.image_size = self._augmentation.check((height, width))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        self.scale = scale_of(self.attributes, self.path)
        self.interval_minutes = interval_of(self.attributes, self.path)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._checked(index)
        total = self.input_length + self.output_length
        window = self._frames(index, total)
        stacks: tuple[Any, ...] = (window,)
        if self.include_valid:
            stacks += (self.valid(index)[:total],)
        window, *valid = self._augmentation.apply(stacks, self._epoch, index)
        frames = torch.from_numpy(window)
        item: dict[str, Any] = {
            "input": frames[: self.input_length],
            "target": frames[self.input_length :],
            "index": index,
        }
        if valid:
            item["valid"] = torch.from_numpy(valid[0])
        return item

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_pid": -1}

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of an epoch.

        Set in the main process it holds there and in all its workers; set in a worker, in that worker.
        """
        if get_worker_info() is None:
            self._shared_epoch.fill_(epoch)
        else:
            self._worker_epoch = epoch

    def whole(self, index: int) -> np.ndarray:
        """Return the frames ``(T_in + T_out, *stored_size)`` float32 of a window, without augmentation."""
        return self._frames(self._checked(index), self.input_length + self.output_length)

    @property
    def augmentation(self) -> Augmentation:
        """Return what is done to windows at random."""
        return self._augmentation

    def timestamps(self, index: int) -> list[str]:
        """Return the times of all frames of a window as the file spells them; empty if it has none."""
        if not self._has["timestamps"]:
            return []
        stamps = self._read("timestamps", self._checked(index)).reshape(-1)
        return [stamp.decode(errors="replace") if isinstance(stamp, bytes) else str(stamp) for stamp in stamps]

    def times(self, index: int) -> list[datetime | None]:
        """Return the times of all frames of a window, naive UTC; None for those that do not parse."""
        return [parse_timestamp(stamp) for stamp in self.timestamps(index)]

    def valid(self, index: int) -> np.ndarray:
        """Return ``(T, H, W)`` bool, False where the radar gave no data; True if the file does not say."""
        index = self._checked(index)
        if self.has_valid:
            return self._read("valid", index) != 0
        return np.ones((self._stored_frames, *self.stored_size), dtype=np.bool_)

    @property
    def has_valid(self) -> bool:
        """Tell whether the file says where the radar gave no data."""
        return self._has["valid"]

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _epoch(self) -> int:
        return int(self._shared_epoch) if self._worker_epoch is None else self._worker_epoch

    def _checked(self, index: int) -> int:
        if not -self._length <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        return int(index) % self._length

    def _opened(self) -> h5py.File:
        if self._file is None or self._pid != os.getpid():
            # A handle that came with a fork shares the parent's place in the file.
            self.close()
            self._file, self._pid = open_hdf5(self.path), os.getpid()
        return self._file

    def _read(self, name: str, index: int, frames: int | None = None) -> np.ndarray:
        where = f"{self.path}, {self.split} window {index}: {name}"
        file = self._opened()
        try:
            dataset: Any = file[f"{self.split}/{name}"]
        except BROKEN as error:
            raise UserError(f"{where} {why(error)}") from error
        return read_row(dataset, index, where, frames)

    def _frames(self, index: int, total: int) -> np.ndarray:
        with np.errstate(over="ignore"):  # numbers of 64 bits that become infinite are found below
            window = self._read("images", index, total).astype(np.float32, copy=False)
        self._check_values(window, index)
        return window

    def _check_values(self, window: np.ndarray, index: int) -> None:
        if window.size == 0:
            return
        # NaN compares false, so this finds it too.
        least, most = float(window.min()), float(window.max())
        if least >= 0 and most * self.scale <= LARGEST_DEPTH:
            return
        what = f"up to {most * self.scale:g} mm of rain in 5 minutes; divide data by scale_mm_per_5min, or correct that"
        if not np.isfinite(window).all():
            what = "values that are not finite (NaN or Inf); prepare the file again"
        elif least < 0:
            what = "negative values; prepare the file again"
        raise UserError(f"{self.path}, {self.split} window {index} holds {what}")

    def _check_lengths(self, frames: int) -> None:
        if self.input_length < 1:
            raise UserError(f"input_length must be at least 1, got {self.input_length}")
        if self.input_length > frames or self.input_length + self.output_length > frames:
            asked = f"{self.input_length} + {max(self.output_length, 0)}"
            raise UserError(
                f"{self.path}: windows of {self.split} have {frames} frames, fewer than {asked} asked for; "
                "give smaller input and output lengths"
            )
        if self.output_length < 0:
            raise UserError(f"output_length must be 0 or more, got {self.output_length}")
