"""Batches as one endless, exactly repeatable stream, whatever Lightning's counters say.

The batch at ``position`` p (counted from the start of training) follows from (seed, p) alone: epoch and
place in it, the windows, their augmentation. A resumed run therefore needs one number.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.resident.places import Key, Place

__all__ = ["BatchStream", "epoch_order", "windows_per_batch"]

_ORDER_STREAM = 2  # the masks use the streams 0 and 1 of the same seed


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


class BatchStream:
    """Iterate over the batches of one epoch; hold the position over all epochs.

    A batch is ``{"input": (B, T, H, W) float32, "index": (B,) int64, "position": int}``. Batches are whole:
    the windows left over at the end of an epoch rest until the next, which shuffles anew. With several
    devices each gets its own part of each global batch. State dict and length are what Lightning asks of a
    resumable loader.

    Args:
        place: where the windows come from
        numbers: the windows to serve, by their numbers in the data set
        batch_size: windows of one batch on one device; less if there are not so many
        seed: with the position, all that the order of the windows depends on
        rank: number of this device
        world_size: number of devices
        pin_memory: keep the indices where a GPU fetches them without anyone waiting
    """

    def __init__(
        self,
        place: Place,
        numbers: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.place = place
        self.numbers = numbers
        self.batch_size = windows_per_batch(len(numbers), batch_size, world_size)
        self.batches_per_epoch = len(numbers) // (self.batch_size * world_size)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.waited = 0.0
        self.mark: Callable[[str], None] | None = None  # told where waiting for data begins ("other" ends) and ends
        self._pin_memory = pin_memory

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
            batch["position"] = self.position
            self.position += 1
            yield batch

    def _mark(self, ended: str) -> None:
        if self.mark is not None:
            self.mark(ended)

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield the batches from the current position to the end of its epoch."""
        keys = self._remaining_keys()
        for part, frames in zip(keys, self.place.batches(keys), strict=True):
            index = torch.tensor([index for _, index in part])
            yield {"input": frames, "index": index.pin_memory() if self._pin_memory else index}

    def _remaining_keys(self) -> list[list[Key]]:
        """Return the keys of this device's batches from the current position to the end of its epoch."""
        epoch, first = divmod(self.position, self.batches_per_epoch)
        order = epoch_order(len(self.numbers), self.seed, epoch)
        batches = []
        for batch in range(first, self.batches_per_epoch):
            start = (batch * self.world_size + self.rank) * self.batch_size
            places = order[start : start + self.batch_size]
            batches.append([(epoch, self.numbers[int(place)]) for place in places])
        return batches

    def state_dict(self) -> dict[str, int]:
        """Return the position, the whole state of the stream."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position of an earlier stream."""
        self.position = int(state["position"])
