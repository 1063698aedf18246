"""Serve batches from windows that stay where training runs: no file is read, and no process copies frames.

The same windows under the same augmentation come out of all three places: memory of the host for training on a CPU;
memory of the device; or memory of the host, pinned batch by batch and sent ahead, for a GPU that has no room.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.resident.store import Encoding, WindowStore, decode

__all__ = ["Key", "OnDevice", "OnHost", "Place", "SentAhead", "choose_place", "free_memory", "place_windows"]

Key = tuple[int, int]
"""(epoch, index): what a window and its augmentation follow from."""

Where = Literal["device", "host"]
DEVICE_SHARE = 1 / 3  # of the free memory of a GPU: the larger part is for the training step
AHEAD = 2  # batches on their way
UPLOAD = 64  # windows copied to the device at once

Job = TypeVar("Job")
Result = TypeVar("Result")


class Place(Protocol):
    """Say what a place of windows must offer."""

    def batches(self, jobs: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        """Yield for each list of keys the frames ``(B, T, H, W)`` float32 in data units, where they train."""
        ...


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of the machine's memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 40  # the system does not say; it will when it has none left


def choose_place(asked: Literal["auto", "device", "host"], nbytes: int, device: torch.device) -> Where:
    """Return where windows of ``nbytes`` stay; ``auto`` leaves two thirds of a GPU's free memory to the step."""
    if device.type != "cuda":
        return "host"
    if asked == "auto":
        return "device" if nbytes <= DEVICE_SHARE * free_memory(device) else "host"
    return asked


def place_windows(store: WindowStore, augmentation: Augmentation, where: Where, device: torch.device) -> Place:
    """Bring windows to where they stay during training."""
    if where == "device":
        return OnDevice(store, augmentation, device)
    return SentAhead(store, augmentation, device) if device.type == "cuda" else OnHost(store, augmentation)


class OnHost:
    """Crop, flip, turn and scale windows in the memory of the machine, in one pass from 16 bits to float32."""

    def __init__(self, store: WindowStore, augmentation: Augmentation) -> None:
        self.store = store
        self.augmentation = augmentation
        self.size = augmentation.check(store.image_size)

    def batches(self, jobs: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        """Yield batches on the CPU."""
        for keys in jobs:
            out = np.empty((len(keys), self.store.frames, *self.size), np.float32)
            for frames, (epoch, index) in zip(out, keys, strict=True):
                decode(self.augmentation.view(self.store.codes[index], epoch, index), self.store.encoding, frames)
            yield torch.from_numpy(out)


class OnDevice:
    """Hold all windows in the memory of a device, and treat a whole batch by a few kernels there."""

    def __init__(self, store: WindowStore, augmentation: Augmentation, device: torch.device) -> None:
        self.augmentation = augmentation
        self.device = device
        self.image_size = store.image_size
        self.size = augmentation.check(store.image_size)
        self.encoding = store.encoding
        self.codes = torch.empty(store.codes.shape, dtype=_torch_type(store), device=device)
        for start in range(0, len(store), UPLOAD):
            part = _as_tensor(np.array(store.codes[start : start + UPLOAD]))
            self.codes[start : start + UPLOAD].copy_(part)

    def batches(self, jobs: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        """Yield batches on the device; nothing waits for it."""
        for keys in jobs:
            order = _sent(_order(keys, self.augmentation, self.image_size), self.device)
            yield _treat(self.codes.index_select(0, order[0]), order, self.size, self.encoding)


class SentAhead:
    """Keep windows in the memory of the host, and send whole ones, still 16 bits, before they are asked for.

    A thread copies a batch into pinned memory and sends it on a stream of its own, while the step before is
    running; the device then treats it as `OnDevice` does.
    """

    def __init__(self, store: WindowStore, augmentation: Augmentation, device: torch.device) -> None:
        self.store = store
        self.augmentation = augmentation
        self.device = device
        self.size = augmentation.check(store.image_size)
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def batches(self, jobs: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        """Yield batches on the device."""
        for codes, order, sent in ahead(jobs, self._send):
            if sent is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(sent)  # the device waits, not this thread
                codes.record_stream(current)
                order.record_stream(current)
            yield _treat(codes, order, self.size, self.store.encoding)

    def _send(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Any]:
        shape = (len(keys), *self.store.codes.shape[1:])
        codes = torch.empty(shape, dtype=_torch_type(self.store), pin_memory=self._cuda)
        indices = [index for _, index in keys]
        np.take(self.store.codes, indices, axis=0, out=codes.numpy().view(self.store.codes.dtype), mode="clip")
        order = _order(keys, self.augmentation, self.store.image_size)
        if self._stream is None:
            return codes.to(self.device), _sent(order, self.device), None
        with torch.cuda.stream(self._stream):
            codes, order = codes.to(self.device, non_blocking=True), _sent(order, self.device)
            return codes, order, self._stream.record_event()


def ahead(jobs: Iterable[Job], work: Callable[[Job], Result], count: int = AHEAD) -> Generator[Result]:
    """Yield the results of ``work`` in order; one thread works on up to ``count`` jobs before they are due."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="windows")
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _order(keys: Sequence[Key], augmentation: Augmentation, size: tuple[int, int]) -> Tensor:
    """Return which windows a batch takes, ``(1, B)`` int64; below them, if pixels move, where from, ``(4, B)``."""
    if augmentation.idle:
        return torch.tensor([[index for _, index in keys]])
    return torch.tensor([(key[1], *augmentation.affine(size, *key)) for key in keys]).T.contiguous()


def _sent(order: Tensor, device: torch.device) -> Tensor:
    """Send an order without waiting for the device: from pageable memory a copy would."""
    return (order.pin_memory() if device.type == "cuda" else order).to(device, non_blocking=True)


def _treat(codes: Tensor, order: Tensor, size: tuple[int, int], encoding: Encoding) -> Tensor:
    """Gather the pixels of treated windows ``(B, T, *size)`` from ``codes`` ``(B, T, H, W)``, and scale them."""
    if len(order) > 1:
        offset, down, right = order[1:, :, None, None]
        rows, columns = (torch.arange(length, device=codes.device) for length in size)
        places = (offset + rows[:, None] * down + columns * right).flatten(1)
        codes = codes.flatten(2).gather(2, places[:, None].expand(-1, codes.shape[1], -1)).unflatten(2, size)
    frames = codes.float()
    if encoding.unit is None:
        return frames
    frames.mul_(encoding.unit)
    return frames.masked_fill_(codes < 0, torch.nan) if encoding.gaps else frames  # only `MISSING` is below 0


def _torch_type(store: WindowStore) -> torch.dtype:
    return torch.float32 if store.encoding.unit is None else torch.int16


def _as_tensor(codes: np.ndarray) -> Tensor:
    """View 16-bit codes as int16, which kernels know; `store` keeps the sign bit free."""
    return torch.from_numpy(codes.view(np.int16) if codes.dtype == np.uint16 else codes)
