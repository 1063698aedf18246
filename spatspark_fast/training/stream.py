"""Batches as one endless, exactly repeatable stream, whatever Lightning's counters say.

The batch at ``position`` p (counted from the start of training) follows from (seed, p) alone: epoch and
place in it, the windows, their augmentation. A resumed run therefore needs one number, and reading processes
that stay alive over epochs need no message: each item is asked for by its (epoch, index).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.resident.places import Key, Place
from spatspark_fast.training.options import TrainingConfig

__all__ = ["BatchStream", "WindowDataset", "batches_of", "epoch_order", "windows_per_batch"]

_ORDER_STREAM = 2  # the masks use the streams 0 and 1 of the same seed


class WindowDataset(Protocol):
    """Say what a data set of windows must offer."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def set_epoch(self, epoch: int) -> None: ...


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the windows in an epoch, ``(length,)`` int64, from (seed, epoch) alone."""
    return np.random.default_rng((_ORDER_STREAM, seed, epoch)).permutation(length)


def windows_per_batch(length: int, batch_size: int, world_size: int = 1) -> int:
    """Return the batch size of one device: as asked for, or an equal share of a data set smaller than that.

    Raises UserError if there are fewer windows than devices.
    """
    if length < world_size:
        raise UserError(f"{length} windows cannot be shared by {world_size} devices: give more data or fewer devices")
    return min(batch_size, length // world_size)


@dataclass
class _Failure:
    """Carry a UserError out of a reading process, where torch would wrap it in a traceback."""

    message: str


class _Keyed(Dataset[Any]):
    """Serve (epoch, index) keys."""

    def __init__(self, windows: WindowDataset) -> None:
        self.windows = windows
        self.epoch: int | None = None

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        try:
            if epoch != self.epoch:
                self.windows.set_epoch(epoch)
                self.epoch = epoch
            return self.windows[index]
        except UserError as error:
            return _Failure(str(error))


class BatchStream:
    """Iterate over the batches of one epoch; hold the position over all epochs.

    A batch is ``{"input": (B, T, H, W) float32, "index": (B,) int64, "position": int}``. Batches are whole:
    the windows left over at the end of an epoch rest until the next, which shuffles anew. With several
    devices each gets its own part of each global batch. State dict and length are what Lightning asks of a
    resumable loader.

    Windows are read by ``num_workers`` processes; or they come from a ``place`` where they all are already,
    which yields the same batches faster, on the device that it serves.
    """

    def __init__(
        self,
        windows: WindowDataset,
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        place: Place | None = None,
    ) -> None:
        self.windows = windows
        self.place = place
        self.batch_size = windows_per_batch(len(windows), batch_size, world_size)
        self.batches_per_epoch = len(windows) // (self.batch_size * world_size)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.waited = 0.0
        self.mark: Callable[[str], None] | None = None  # told where waiting for data begins ("other" ends) and ends
        self._pin_memory = pin_memory
        self._loader: DataLoader[Any] | None = None if place is not None else self._open_loader(num_workers)

    def _open_loader(self, num_workers: int) -> DataLoader[Any]:
        return DataLoader(
            _Keyed(self.windows),
            batch_sampler=_KeySampler(self),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=self._pin_memory,
            collate_fn=_collate,
            # A generator of its own: the loader's base seed must not advance the global one.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: nothing is read before the first batch is asked for, when the position is known.
        batches = self._batches()
        while True:
            self._mark("other")
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            self._mark("data")
            if batch is None:
                return
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            batch["position"] = self.position
            self.position += 1
            yield batch

    def _mark(self, ended: str) -> None:
        if self.mark is not None:
            self.mark(ended)

    def _batches(self) -> Iterator[Any]:
        """Yield the batches from the current position to the end of its epoch."""
        if self._loader is not None:
            yield from self._loader
        if self.place is None:
            return
        keys = list(self.remaining_keys())
        for part, frames in zip(keys, self.place.batches(keys), strict=True):
            index = torch.tensor([index for _, index in part])
            yield {"input": frames, "index": index.pin_memory() if self._pin_memory else index}

    def keys(self, position: int) -> list[Key]:
        """Return the (epoch, index) keys of this device's batch at a position."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        return self._slice(epoch_order(len(self.windows), self.seed, epoch), epoch, batch)

    def remaining_keys(self) -> Iterator[list[Key]]:
        """Yield the keys of the batches from the current position to the end of its epoch."""
        epoch, first = divmod(self.position, self.batches_per_epoch)
        order = epoch_order(len(self.windows), self.seed, epoch)
        for batch in range(first, self.batches_per_epoch):
            yield self._slice(order, epoch, batch)

    def _slice(self, order: np.ndarray, epoch: int, batch: int) -> list[Key]:
        start = (batch * self.world_size + self.rank) * self.batch_size
        return [(epoch, int(index)) for index in order[start : start + self.batch_size]]

    def state_dict(self) -> dict[str, int]:
        """Return the position, the whole state of the stream."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position of an earlier stream."""
        self.position = int(state["position"])


class _KeySampler:
    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[list[Key]]:
        return self.stream.remaining_keys()


def _collate(items: Sequence[Any]) -> dict[str, Any] | _Failure:
    for item in items:
        if isinstance(item, _Failure):
            return item
    frames: list[Tensor] = [torch.as_tensor(item["input"]) for item in items]
    return {"input": torch.stack(frames), "index": torch.tensor([int(item["index"]) for item in items])}


def batches_of(
    windows: WindowDataset, config: TrainingConfig, trainer: L.Trainer, place: Place | None = None
) -> BatchStream:
    """Return this device's share of the batches; without a ``place`` windows are read one by one."""
    return BatchStream(
        windows,
        config.data.batch_size,
        seed=config.trainer.seed,
        num_workers=config.data.num_workers,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        pin_memory=trainer.strategy.root_device.type == "cuda",
        place=place,
    )
