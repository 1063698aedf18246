"""Decide where the windows of a run stay, bring them there, and open the stream of batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import lightning as L
import torch

from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.resident.cache import NoRoomError, unpacked
from spatspark_fast.data.resident.places import Place, choose_place, free_memory, place_windows
from spatspark_fast.data.resident.store import WindowStore, in_memory
from spatspark_fast.pretrain.build import Remembered, Windows
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.options import DataOptions
from spatspark_fast.training.stream import BatchStream, batches_of

__all__ = ["open_place", "open_stream"]

HOST_SHARE = 1 / 2  # of the machine's free memory that made-up windows may take; those of a file are mapped
PIXEL = 2  # bytes
MANY = 256  # synthetic windows of 288 x 288 pixels are made at some 30 a second

Say = Callable[[str], None]


def open_stream(config: PretrainConfig, windows: Windows, trainer: L.Trainer, say: Say) -> BatchStream:
    """Open the batches of this device; ``say`` is told what takes time.

    Raises `UserError` for windows that cannot be read, and for a place that was asked for and has no room.
    """
    place = open_place(config.data, windows, trainer.strategy.root_device, say)
    return batches_of(windows, config, trainer, place)


def open_place(config: DataOptions, windows: Windows, device: torch.device, say: Say) -> Place | None:
    """Bring the windows to where they stay; None where they are read one by one."""
    asked = config.resident
    if asked == "off" or device.type not in ("cpu", "cuda"):
        return None
    try:
        store = _stored(config, windows, asked, say)
    except NoRoomError as error:
        if asked != "auto":
            raise
        say(f"Note: windows are read from the file one by one: {error}")
        return None
    if store is None:
        return None
    where = choose_place(asked, store.codes.nbytes, device)
    augmentation = windows.augmentation if isinstance(windows, NowcastDataset) else Augmentation()
    return place_windows(store, augmentation, where, device)


def _stored(
    config: DataOptions, windows: Windows, asked: Literal["auto", "device", "host"], say: Say
) -> WindowStore | None:
    if isinstance(windows, NowcastDataset):
        folder = None if config.cache is None else Path(config.cache)
        return unpacked(windows, folder, config.num_workers, say)
    return _made_up(windows, config.input_length, asked, say)


def _made_up(
    windows: Remembered, frames: int, asked: Literal["auto", "device", "host"], say: Say
) -> WindowStore | None:
    """Make all synthetic windows; None where they would not fit, so that they are made when they are needed."""
    height, width = windows.image_size
    size = len(windows) * frames * height * width * PIXEL
    if asked == "auto" and size > HOST_SHARE * free_memory(torch.device("cpu")):
        return None
    if len(windows) > MANY:
        say(f"Making {len(windows)} synthetic windows ({size / 2**30:.2f} GiB)")
    return in_memory(windows.windows, float(windows.scale))
