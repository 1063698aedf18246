"""Serve each window as one stack of frames: those that are seen, and behind them those to come."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar

__all__ = ["WholeWindows"]

REMEMBERED = 1 << 30  # bytes of made-up windows that are kept


class WholeWindows(Dataset[dict[str, Any]]):
    """Serve the windows of a data set as ``{"input": (T_in + T_out, H, W) float32, "index": int}``.

    Frames to come are NaN where the radar gave no data, if the data set includes that; frames of the past hold 0
    there, as in the file. Made-up windows are the same in every epoch and take time to make, so the first of them
    are kept once they are made.
    """

    def __init__(self, windows: NowcastDataset | SyntheticRadar) -> None:
        self.windows = windows
        self.image_size = windows.image_size
        self.scale = float(windows.scale)
        self.past = windows.input_length
        self.frames = windows.input_length + windows.output_length
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        item = self.windows[index]
        frames = _joined(item)
        if "valid" in item:
            frames[self.past :].masked_fill_(~item["valid"][self.past :], torch.nan)
        whole = {"input": frames, "index": item["index"]}
        if isinstance(self.windows, SyntheticRadar) and (len(self._kept) + 1) * frames.nbytes <= REMEMBERED:
            self._kept[index] = whole
        return whole

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of an epoch."""
        self.windows.set_epoch(epoch)

    @property
    def augmentation(self) -> Augmentation:
        """Return what is done to windows at random."""
        return self.windows.augmentation if isinstance(self.windows, NowcastDataset) else Augmentation()

    @property
    def gaps(self) -> bool:
        """Tell whether frames to come may hold NaN."""
        windows = self.windows
        known = isinstance(windows, NowcastDataset) and windows.include_valid and windows.has_valid
        return known and self.frames > self.past

    def untreated(self, index: int) -> NDArray[np.float32]:
        """Return a window ``(T_in + T_out, H, W)`` without crop, flip and turn; it is not kept."""
        windows = self.windows
        if isinstance(windows, SyntheticRadar):
            frames = self._kept[index]["input"] if index in self._kept else _joined(windows[index])
            return frames.numpy()
        frames = windows.whole(index)
        if self.gaps:
            frames[self.past :][~windows.valid(index)[self.past : self.frames]] = np.nan
        return frames


def _joined(item: dict[str, Any]) -> Tensor:
    """Return the frames that are seen and those to come in one stack."""
    return torch.cat((item["input"], item["target"])) if len(item["target"]) else item["input"]
