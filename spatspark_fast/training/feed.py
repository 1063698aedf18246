"""Decide where the windows of a run stay, bring them there, and open the stream of batches."""

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch

from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.reader import Reader
from spatspark_fast.data.resident.cache import NoRoomError, unpacked
from spatspark_fast.data.resident.places import OnHost, Place, choose_place, free_memory, place_windows
from spatspark_fast.data.resident.store import WindowStore, in_memory
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.training.options import DataOptions, Resident
from spatspark_fast.training.stream import BatchStream

__all__ = ["Say", "open_store", "open_stream", "plain_place"]

HOST_SHARE = 1 / 2  # of the machine's free memory that made-up windows may take; those of a file are mapped
PIXEL = 2  # bytes
MANY = 256  # synthetic windows of 288 x 288 pixels are made at some 30 a second

Say = Callable[[str], None]


def open_store(options: DataOptions, windows: WholeWindows, say: Say) -> WindowStore | None:
    """Bring all windows into memory; None where they are read one by one. ``say`` is told what takes time.

    Raises `UserError` for windows that cannot be read, and for a place that was asked for and has no room.
    """
    if options.resident == "off":
        return None
    if not isinstance(windows.windows, NowcastDataset):
        return _made_up(windows, options.resident, say)
    folder = None if options.cache is None else Path(options.cache)
    try:
        return unpacked(windows, folder, options.num_workers, say)
    except NoRoomError as error:
        if options.resident != "auto":
            raise
        say(f"Note: windows are read from the file one by one: {error}")
        return None


def _made_up(windows: WholeWindows, asked: Resident, say: Say) -> WindowStore | None:
    """Make all synthetic windows; None where they would not fit, so that they are made when they are needed."""
    height, width = windows.image_size
    size = len(windows) * windows.frames * height * width * PIXEL
    if asked == "auto" and size > HOST_SHARE * free_memory(torch.device("cpu")):
        return None
    if len(windows) > MANY:
        say(f"Making {len(windows)} synthetic windows ({size / 2**30:.2f} GiB)")
    return in_memory(windows)


def open_stream(
    options: DataOptions,
    windows: WholeWindows,
    store: WindowStore | None,
    trainer: L.Trainer,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> BatchStream:
    """Open the batches of this device: of all windows, or of those with certain ``numbers``."""
    device = trainer.strategy.root_device
    cuda = device.type == "cuda"
    if store is None or options.resident == "off":
        place: Place = Reader(windows, options.num_workers, pin_memory=cuda)
    else:
        where = choose_place(options.resident, store.codes.nbytes, device)
        place = place_windows(store, windows.augmentation, where, device)
    return BatchStream(
        place,
        range(len(windows)) if numbers is None else numbers,
        options.batch_size,
        seed=seed,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        pin_memory=cuda,
    )


def plain_place(options: DataOptions, windows: WholeWindows, store: WindowStore | None) -> Place:
    """Return a place on the CPU that serves windows as they are stored; ``windows`` have no augmentation."""
    return Reader(windows, options.num_workers) if store is None else OnHost(store, windows.augmentation)
