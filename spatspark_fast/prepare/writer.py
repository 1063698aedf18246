"""Write windows as an NL-50 file, completely or not at all."""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.hdf5 import write_attributes
from spatspark_fast.data.radar.timestamps import format_timestamp
from spatspark_fast.prepare.cutter import Window
from spatspark_fast.prepare.output import hdf5_output

__all__ = ["SPLITS", "NL50Writer"]

SPLITS = ("train", "test")
_GZIP_LEVEL = 4
_TIMESTAMP_LENGTH = 24
_STAMPED = 256  # windows whose times are one chunk
_LARGEST_CHUNK = 2**32 - 1


class _Chunks(NamedTuple):
    """One window, compressed: the bytes of one chunk of ``images`` and of ``valid``."""

    split: str
    position: int
    images: bytes
    valid: bytes


class NL50Writer:
    """Write ``(N, T, H, W)`` windows to ``path`` + ``.part``, and rename it when all went well.

    Layout: ``SPLIT/images`` float32 = rain in mm per 5 min / ``scale``, ``SPLIT/valid`` bool,
    ``SPLIT/timestamps`` strings ``(N, T, 1)``. One window is one gzip chunk, so a random read decompresses
    nothing else. Threads compress the chunks, few at a time; they are written in order.

    Raises UserError if a window is larger than HDF5 lets a chunk be.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], scale: float, threads: int = 1) -> None:
        frames, height, width = shape
        if max(4 * height * width, _STAMPED * _TIMESTAMP_LENGTH) * frames > _LARGEST_CHUNK:
            raise UserError(
                f"windows of {frames} frames of {height} x {width} pixels are larger than the 4 GiB that HDF5 can read "
                "at once; give a smaller --data.input_length, --data.output_length or --crop"
            )
        self._scale = scale
        self._count: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self._data: dict[tuple[str, str], h5py.Dataset] = {}
        self._waiting: deque[Future[_Chunks]] = deque()
        self._limit = 2 * max(1, threads)
        self._stack = contextlib.ExitStack()
        self._file, self._output = self._stack.enter_context(hdf5_output(path))
        self._pool = ThreadPoolExecutor(max(1, threads))
        for split in SPLITS:
            self._create(split, shape)

    def __enter__(self) -> NL50Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:  # what is raised here throws the file away
            try:
                if error is not None:
                    raise error
                self._write_until(0)
            finally:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, window: Window) -> None:
        """Append a window to its split."""
        split, index = window.split, self._count[window.split]
        self._count[split] += 1
        stamps = np.array([format_timestamp(time) for time in window.times], dtype=f"S{_TIMESTAMP_LENGTH}")
        for name in ("images", "valid", "timestamps"):
            self._data[split, name].resize(index + 1, axis=0)
        self._data[split, "timestamps"][index] = stamps[:, None]
        self._waiting.append(self._pool.submit(self._compress, split, index, window.rain, window.valid))
        self._write_until(self._limit)

    def set_attributes(self, attributes: Mapping[str, str | float | int]) -> None:
        """Write attributes of the file."""
        write_attributes(self._file, attributes)

    def _create(self, split: str, shape: tuple[int, int, int]) -> None:
        group = self._file.create_group(split)
        for name, dtype in (("images", np.float32), ("valid", np.bool_)):
            self._data[split, name] = group.create_dataset(
                name,
                shape=(0, *shape),
                maxshape=(None, *shape),
                dtype=dtype,
                chunks=(1, *shape),
                compression="gzip",
                compression_opts=_GZIP_LEVEL,
            )
        self._data[split, "timestamps"] = group.create_dataset(
            "timestamps",
            shape=(0, shape[0], 1),
            maxshape=(None, shape[0], 1),
            dtype=h5py.string_dtype("ascii", _TIMESTAMP_LENGTH),
            chunks=(_STAMPED, shape[0], 1),
            compression="gzip",
        )
        self._data[split, "images"].attrs["units"] = "mm per 5 min, divided by scale_mm_per_5min"

    def _compress(self, split: str, index: int, rain: NDArray[np.float32], valid: NDArray[np.bool_]) -> _Chunks:
        images = np.ascontiguousarray(rain / np.float32(self._scale), dtype="<f4")
        return _Chunks(
            split,
            index,
            zlib.compress(images.tobytes(), _GZIP_LEVEL),
            zlib.compress(valid.tobytes(), _GZIP_LEVEL),
        )

    def _write_until(self, left: int) -> None:
        while len(self._waiting) > left:
            chunks = self._waiting.popleft().result()
            for name, content in (("images", chunks.images), ("valid", chunks.valid)):
                self._data[chunks.split, name].id.write_direct_chunk((chunks.position, 0, 0, 0), content)
            self._output.check()
