"""A file that HDF5 can write to without ever seeing the disk fail."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import h5py

from spatspark_fast.common.errors import UserError, WriteError, remedy
from spatspark_fast.common.files import writing
from spatspark_fast.common.locks import lock, same_file
from spatspark_fast.data.hdf5 import LIBVER

__all__ = ["OutputFile", "hdf5_output"]


@contextlib.contextmanager
def hdf5_output(path: Path) -> Iterator[tuple[h5py.File, OutputFile]]:
    """Give an HDF5 file to write to, and what lies below it; it becomes ``path`` when the block ends well.

    Till then its name ends in ``.part``: one for all processes, so that one of them writes, and the next one takes
    the place of what a killed one left.

    Raises:
        UserError: the file cannot be written, or another process is writing it.
    """
    part = path.with_name(path.name + ".part")
    output = OutputFile(part)
    complete = False
    try:
        with h5py.File(output, "w", libver=LIBVER) as file:
            yield file, output
        output.sync()
        output.check()
        complete = True
    finally:
        # Renamed or thrown away before it is closed, which gives up the lock.
        if complete:
            os.replace(part, path)
        else:
            part.unlink(missing_ok=True)
        output.close()


class OutputFile(io.FileIO):
    """Write to a file until the first error, keep that, and take all later writes as done.

    HDF5 cannot close a file whose last blocks do not reach the disk, and crashes when the process ends. The caller
    must call `check`, and throw the file away if that raises.

    Raises:
        UserError: the file cannot be opened, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.error: BaseException | None = None
        self.path = path
        while True:
            with writing(path):
                # Not emptied before it is locked: it may be another run's.
                super().__init__(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+")
            if not lock(self.fileno()):
                self.close()
                raise UserError(f"another run is writing {path}; wait for it or give another --out")
            if same_file(self.fileno(), path):
                break
            self.close()  # its owner has renamed or removed it at this moment
        super().truncate(0)

    def check(self) -> None:
        """Raise the error that was kept, if there is one: `WriteError`, or what a signal raised."""
        if isinstance(self.error, OSError):
            raise WriteError(f"cannot write {self.path}: {remedy(self.error.errno or 0)}") from self.error
        if self.error is not None:
            raise self.error

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write all of the data, or keep the error."""
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                done += super().write(view[done:]) or 0
            except BaseException as error:  # HDF5 would lose it
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length of the file, or keep the error."""
        if self.error is None:
            try:
                return super().truncate(size)
            except BaseException as error:
                self.error = error
        return size or 0

    def sync(self) -> None:
        """Bring the file to the disk as far as the system can, or keep the error."""
        if self.error is None:
            try:
                os.fsync(self.fileno())
            except OSError as error:
                self.error = error
