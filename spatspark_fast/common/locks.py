"""Let one process at a time write a folder or a file; a lock ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import LOCK, check_folder, writing

__all__ = ["lock", "owned", "results_folder", "same_file"]

_held: set[int] = set()


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own what is written to ``folder`` while the block runs; the folder is made, and removed again if it stays empty.

    Child processes do not hold it on. What a killed owner left half written is cleared away.

    Raises:
        UserError: another process owns it, or it cannot be made.
    """
    with writing(folder):
        made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        handle = _taken(folder, path)
        try:
            for stale in folder.glob(".*.tmp"):
                stale.unlink(missing_ok=True)
            yield
        finally:
            path.unlink(missing_ok=True)  # before others can take it: see `_taken`
            _held.discard(handle)
            os.close(handle)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def results_folder(out: Path, overwrite: bool) -> Iterator[None]:
    """Own the folder that results are written to in the block; see `check_folder` and `owned`.

    Raises:
        UserError: it cannot be written, another process owns it, or it holds something without ``overwrite``.
    """
    check_folder(out, overwrite)
    with owned(out):
        check_folder(out, overwrite)  # another process may have written there
        yield


def _taken(folder: Path, path: Path) -> int:
    """Open and lock the file of a lock; one that its owner removes at this moment is left to it."""
    while True:
        with writing(folder):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not lock(handle):
            owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            by = f" ({owner})" if owner else ""
            raise UserError(f"--out {folder} is in use by another process{by}: wait for its end, or give another --out")
        if same_file(handle, path):
            break
        os.close(handle)
    _held.add(handle)
    with contextlib.suppress(OSError):  # the note is a help, no more
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
    return handle


def lock(handle: int) -> bool:
    """Lock an open file for this process alone; False if another one has it. Systems without locks go without."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def same_file(handle: int, path: Path) -> bool:
    """Tell whether an open file still is the one that has the name ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """Close, in a process that was forked, what its parent holds."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
