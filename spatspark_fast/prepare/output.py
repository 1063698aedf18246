"""A file that HDF5 can write to without ever seeing the disk fail."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from spatspark_fast.common.errors import UserError

__all__ = ["OutputFile"]


class OutputFile(io.FileIO):
    """Write to a file until the first error, keep that, and take all later writes as done.

    HDF5 cannot close a file whose last blocks do not reach the disk, and crashes when the process ends. The caller
    must look at ``error`` and, if there is one, throw the file away and say so.

    Raises:
        UserError: the file cannot be opened, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        try:
            # Not emptied before it is locked: it may be another run's.
            super().__init__(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            _lock(self.fileno())
        except OSError as error:
            self.close()
            raise UserError(f"another run is writing {path}; wait for it or give another --out") from error
        super().truncate(0)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write all of the data, or keep the error."""
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                done += super().write(view[done:]) or 0
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length of the file, or keep the error."""
        if self.error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.error = error
        return size or 0

    def sync(self) -> None:
        """Bring the file to the disk as far as the system can, or keep the error."""
        if self.error is None:
            try:
                os.fsync(self.fileno())
            except OSError as error:
                self.error = error


def _lock(handle: int) -> None:
    """Lock a file for this process alone; OSError if another has it. Systems without flock go without."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
