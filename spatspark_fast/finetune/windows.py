"""Windows for learning to forecast: past and future in one stack, and a part held out by time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import torch
from torch import Tensor

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar

__all__ = ["ForecastWindows", "Split", "hold_out"]

REMEMBERED = 128  # made-up windows that are kept; 24 frames of 288 x 288 pixels take 8 MB each


class ForecastWindows:
    """Serve some windows of a data set whole, as ``{"input": (T_in + T_out, H, W) float32, "index": int}``.

    Pixels of frames to come are NaN where the radar gave no data; frames of the past hold 0 there, as in the
    file. One stack for past and future, so that whatever carries windows to the device treats them alike; see
    `split_frames`.
    """

    def __init__(self, windows: NowcastDataset | SyntheticRadar, indices: Sequence[int] | None = None) -> None:
        self.windows = windows
        self.indices = list(range(len(windows))) if indices is None else list(indices)
        self.image_size = windows.image_size
        self.scale = float(windows.scale)
        self.in_length = windows.input_length
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        item = self.windows[self.indices[index]]
        frames = torch.cat((item["input"], item["target"]))
        if "valid" in item:
            frames[self.in_length :].masked_fill_(~item["valid"][self.in_length :], torch.nan)
        whole = {"input": frames, "index": item["index"]}
        if isinstance(self.windows, SyntheticRadar) and len(self._kept) < REMEMBERED:
            self._kept[index] = whole  # the same in every epoch, and making them takes time
        return whole

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of an epoch."""
        self.windows.set_epoch(epoch)

    def split_frames(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Cut ``(B, T_in + T_out, H, W)`` into past and future."""
        return frames[:, : self.in_length], frames[:, self.in_length :]


@dataclass(frozen=True)
class Split:
    """Hold which windows train and which validate; ``dropped`` counts those that would be in both by time."""

    train: list[int]
    validation: list[int]
    dropped: int
    timed: bool


def hold_out(windows: NowcastDataset | SyntheticRadar, fraction: float) -> Split:
    """Hold out the newest ``fraction`` of the windows, and drop those that share frames with them.

    Where not every window has a time that can be read, their order in the file counts as order in time, and as
    many windows are dropped as a window has frames, at most a quarter. Raises UserError if nothing would be left
    to train on.
    """
    length = len(windows)
    if fraction == 0:
        return Split(list(range(length)), [], 0, True)
    held = max(1, round(fraction * length))
    spans = _spans(windows)
    if spans is None:
        frames = windows.input_length + windows.output_length
        dropped = min(frames - 1, length // 4)
        order, last = list(range(length)), length - held
        train = order[: max(last - dropped, 0)]
    else:
        order, last = sorted(range(length), key=lambda i: (spans[i], i)), length - held
        first_held = spans[order[last]][0] if held < length else spans[order[0]][0]
        train = [i for i in order[:last] if spans[i][1] < first_held]
    if not train:
        raise UserError(
            f"of {length} windows none is left to train on when {held} are held out for validation and those that "
            "share frames with them are dropped: give more data, or --data.validation_fraction 0"
        )
    return Split(sorted(train), sorted(order[last:]), length - held - len(train), spans is not None)


def _spans(windows: NowcastDataset | SyntheticRadar) -> list[tuple[datetime, datetime]] | None:
    """Return the times of the first and the last frame of every window, or None where one has none."""
    frames = windows.input_length + windows.output_length
    spans = []
    for index in range(len(windows)):
        times = list(windows.times(index))[:frames]
        if not times or times[0] is None or times[-1] is None:
            return None
        spans.append((times[0], max(times[-1], times[0] + timedelta(minutes=units.FRAME_MINUTES * (frames - 1)))))
    return spans
