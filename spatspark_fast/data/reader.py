"""Serve batches of windows that are read one by one, in this process or in others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.signals import left_to_parent
from spatspark_fast.data.resident.places import Key

__all__ = ["Reader", "WindowDataset"]


class WindowDataset(Protocol):
    """Say what a data set of windows must offer; frames are its items' ``"input"``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def set_epoch(self, epoch: int) -> None:
        """Draw what is random as epoch ``epoch`` asks."""


class Reader:
    """Read windows when they are needed, as a `Place` that holds none of them.

    The ``num_workers`` processes live on from one call of `batches` to the next and need no message: each item is
    asked for by its (epoch, index).
    """

    def __init__(self, windows: WindowDataset, num_workers: int = 0, pin_memory: bool = False) -> None:
        self._jobs = _Jobs()
        self._loader: DataLoader[Any] = DataLoader(
            _Keyed(windows),
            batch_sampler=self._jobs,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=left_to_parent,
            # A generator of its own: the loader's base seed must not advance the global one.
            generator=torch.Generator(),
        )

    def batches(self, jobs: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        """Yield for each list of keys the frames ``(B, T, H, W)`` on the CPU.

        Raises:
            UserError: a window cannot be read.
        """
        self._jobs.jobs = jobs
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch


class _Jobs:
    """Hand the jobs of the moment to a loader that is made once."""

    def __init__(self) -> None:
        self.jobs: Iterable[Sequence[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return (list(keys) for keys in self.jobs)


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
            return torch.as_tensor(self.windows[index]["input"])
        except UserError as error:
            return _Failure(str(error))


def _collate(items: Sequence[Any]) -> Tensor | _Failure:
    return next((item for item in items if isinstance(item, _Failure)), None) or torch.stack(list(items))
