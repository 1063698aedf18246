"""Unpack a compressed file of windows once, into a file that later runs map into memory.

::

    4096 bytes       what it was made of, as JSON in a line; what does not fit the source is made anew
    N * T * H * W    pixels, uint16 or float32 (see `store`)
    N * 4 bytes      a checksum (CRC-32) of each window
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatspark_fast.common.errors import UserError, WriteError
from spatspark_fast.common.files import atomic_path, writing
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.parallel import ordered_map
from spatspark_fast.data.resident.store import Encoding, OffGridError, WindowStore, encoding_of, stored
from spatspark_fast.data.windows import WholeWindows

__all__ = ["NoRoomError", "default_folder", "unpacked"]

_logger = logging.getLogger(__name__)

HEADER = 4096
FORMAT = 1
SPARE = 1 << 30  # bytes that stay free on the disk
BATCH = 8  # windows that a reading process answers with


class NoRoomError(UserError):
    """Tell that the uncompressed copy cannot be written for lack of space or permission."""


def default_folder() -> Path:
    """Return ``spatspark-fast`` in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spatspark-fast"


def unpacked(
    windows: WholeWindows,
    folder: Path | None = None,
    workers: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> WindowStore:
    """Return all windows of a file, mapped from their uncompressed copy in ``folder``.

    The copy is made where there is none yet, where the source has another size or time of change, and where
    it is damaged. It is written beside its place and then renamed, so a killed process leaves no half of one.
    Of several processes one writes; the others wait and take what it wrote. ``workers`` processes decompress.
    ``say`` is told what takes time. Augmentation is left out: windows are stored whole.

    Raises:
        NoRoomError: the folder cannot be written, or its disk is full.
        UserError: a window cannot be read or holds values that are no rain.
    """
    copy = _Copy.of(windows, default_folder() if folder is None else folder)
    if (store := copy.open()) is not None:
        return store
    try:
        with writing(copy.path):
            copy.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(copy.path):
            if (store := copy.open()) is None:
                copy.make(windows, workers, say)
                store = copy.open()
    except WriteError as error:
        raise NoRoomError(
            f"no uncompressed copy can be kept: {error}; or give another folder by --data.cache, or read the file "
            "window by window with --data.resident off"
        ) from error
    if store is None:
        raise NoRoomError(f"{copy.path} was written and cannot be read back: give another folder by --data.cache")
    return store


@dataclass(frozen=True)
class _Copy:
    """Name the uncompressed copy of one split of one file, and what must be true of it."""

    path: Path
    source: dict[str, Any]
    shape: tuple[int, ...]
    gaps: bool

    @classmethod
    def of(cls, windows: WholeWindows, folder: Path) -> _Copy:
        file = windows.windows
        if not isinstance(file, NowcastDataset):
            raise TypeError(f"windows of a file are unpacked, got those of a {type(file).__name__}")
        path = file.path.resolve()
        found = path.stat()
        shape = (len(file), windows.frames, *file.stored_size)
        key = {"path": str(path), "split": file.split, "frames": windows.frames, "scale": windows.scale}
        if windows.gaps:  # what is NaN begins behind the past
            key["past"] = windows.past
        digest = hashlib.sha256(json.dumps([FORMAT, key]).encode()).hexdigest()[:16]
        source = {**key, "bytes": found.st_size, "changed_ns": found.st_mtime_ns}
        return cls(folder / f"{path.stem}-{file.split}-{digest}.windows", source, shape, windows.gaps)

    def header(self, encoding: Encoding) -> bytes:
        text = {"format": FORMAT, "source": self.source, "shape": self.shape, "unit": encoding.unit}
        line = json.dumps(text).encode()
        if len(line) >= HEADER:
            raise NoRoomError(f"the path {self.source['path']} is too long for an uncompressed copy")
        return line.ljust(HEADER - 1) + b"\n"

    def bytes_of(self, encoding: Encoding) -> int:
        """Return the size of the whole file."""
        return HEADER + int(np.prod(self.shape)) * encoding.dtype.itemsize + 4 * self.shape[0]

    def open(self) -> WindowStore | None:
        """Map the copy; None if there is none that fits the source and is whole."""
        try:
            with self.path.open("rb") as file:
                header = file.read(HEADER)
            unit = json.loads(header)["unit"]
            encoding = Encoding(None if unit is None else float(unit), self.gaps)
            if header != self.header(encoding) or self.path.stat().st_size != self.bytes_of(encoding):
                return None
            codes = np.memmap(self.path, encoding.dtype, "r", HEADER, self.shape)
            sums = np.memmap(self.path, "<u4", "r", HEADER + codes.nbytes, self.shape[:1])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            if list(pool.map(_checksum, codes)) != sums.tolist():
                _logger.warning("%s is damaged; it is made anew", self.path)
                return None
        return WindowStore(codes, encoding, zlib.crc32(sums.tobytes()))

    def make(self, windows: WholeWindows, workers: int, say: Callable[[str], None]) -> None:
        """Write the copy; with 16 bits a pixel if all windows allow it, else with 32."""
        for stale in self.path.parent.glob(f".{self.path.name[:50]}.*.tmp"):
            stale.unlink(missing_ok=True)  # of a process that was killed: whoever still writes holds the lock
        encoding = encoding_of(windows)
        try:
            self._write(windows, encoding, workers, say)
        except OffGridError:
            self._write(windows, Encoding(None, self.gaps), workers, say)

    def _write(self, windows: WholeWindows, encoding: Encoding, workers: int, say: Callable[[str], None]) -> None:
        size = self.bytes_of(encoding)
        free = shutil.disk_usage(self.path.parent).free
        if size + SPARE > free:
            raise NoRoomError(
                f"the uncompressed copy {self.path} takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
                "give another folder by --data.cache, or read window by window with --data.resident off"
            )
        say(f"Unpacking {len(windows)} windows once ({size / 2**30:.2f} GiB, {encoding.name}) to {self.path}")
        read = _Reader(windows, encoding)
        sums: list[int] = []
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            file.write(self.header(encoding))
            for codes in ordered_map(read, range(len(windows)), workers, BATCH):
                file.write(codes.data)
                sums.append(_checksum(codes))
            file.write(np.array(sums, "<u4").tobytes())


@dataclass
class _Reader:
    """Read and encode windows, in this process or in another."""

    windows: WholeWindows
    encoding: Encoding

    def __call__(self, indices: list[int]) -> list[np.ndarray]:
        return [stored(self.windows.untreated(index), self.encoding) for index in indices]


def _checksum(codes: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(codes).data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block, where the system can; elsewhere the rename has to do."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with writing(path):
        file = path.with_name(f".{path.name}.lock").open("w")
    with file:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
