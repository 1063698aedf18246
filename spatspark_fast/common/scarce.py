"""Tell, by an exception, that the system denied something or ran out of it, and what helps."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

from spatspark_fast.common.errors import remedy

__all__ = ["scarcity"]

SCARCE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
)
# Where libraries raise a RuntimeError (torch), an ImportError (the loader) or an OSError without a code.
HANDLES = re.compile(r"Too many open files|received 0 items of ancdata")
MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|Cannot allocate memory|"
    r"failed to map segment|can't start new thread|CUBLAS_STATUS_ALLOC_FAILED"
)
SHARED = re.compile(
    r"unable to (allocate|write|open) .*shared memory|unable to write to file </torch|shared memory \(shm"
)
WORKER = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (is killed by signal|exited unexpectedly)")


def scarcity(error: BaseException) -> str | None:
    """Return a sentence for an exception that says that memory, handles, disk or rights are missing; else None.

    Only kinds that cannot be a defect of ours count: MemoryError, torch's out of memory, codes of the system, and
    what torch and the loader of libraries say of those.
    """
    for one in _with_causes(error):
        if (found := _of(one)) is not None:
            return found
    return None


def _of(error: BaseException) -> str | None:
    torch = sys.modules.get("torch")
    text = str(error)
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return _out_of_memory(text)
    if isinstance(error, OSError) and error.errno in SCARCE:
        about = f"{str(error.filename)[:80]}: " if error.filename is not None else ""
        return about + (_out_of_memory("") if error.errno == errno.ENOMEM else remedy(error.errno))
    if isinstance(error, BrokenProcessPool):
        return "a process that reads ended before its work was done, killed or out of memory: lower --data.num_workers"
    if isinstance(error, (RuntimeError, ImportError, OSError)):
        if HANDLES.search(text):
            return remedy(errno.EMFILE)
        if SHARED.search(text):
            return "the machine's shared memory (/dev/shm) is full: lower --data.num_workers, 0 uses none"
        if WORKER.search(text):
            return "a process that reads ended by itself, killed or out of memory: lower --data.num_workers"
        if MEMORY.search(text):
            return _out_of_memory(text)
    return None


def _out_of_memory(text: str) -> str:
    tried = re.search(r"(?:tried to allocate|allocate|Tried to allocate) ([\d.]+ ?(?:bytes|[KMGT]iB))", text)
    of = f" (no room for {tried[1]})" if tried else ""
    where = "of the GPU " if "CUDA" in text else ""
    return (
        f"out of memory {where}{of}".rstrip().replace("  ", " ")
        + ": take smaller batches (--data.batch_size), images (--data.crop, --tile) or models (--model.decoder_width), "
        "fewer --data.num_workers, or close other programs"
    )


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
