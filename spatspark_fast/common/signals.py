"""Let a signal end a command as an error does: what is half written is thrown away."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from spatspark_fast.common.errors import RunStopped

__all__ = ["ENDING", "is_worker", "left_to_parent", "signals_as", "stopping"]

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end."""

CLEANING = 2.0  # seconds after a signal in which another one does not disturb the cleaning up

Handler = Callable[[int, FrameType | None], Any]


@contextlib.contextmanager
def signals_as(handler: Handler) -> Iterator[None]:
    """Answer `ENDING` signals by ``handler`` in the block; what is ignored (nohup) stays so.

    Only the main thread can; in others the block runs as it is.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in ENDING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, signal.SIG_DFL if before is None else before)


def stopping(saying: Callable[[str], str] = "stopped by {}".format) -> Handler:
    """Return a handler that raises `RunStopped`, ``saying`` what to say; it lets the cleaning up that follows be."""
    owner, last = os.getpid(), 0.0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:  # a worker that was forked
            os._exit(128 + signum)
        now, before = time.monotonic(), last
        last = now
        if not before or now - before > CLEANING:
            raise RunStopped(signum, saying(signal.Signals(signum).name))

    return stop


def left_to_parent(*_: object) -> None:
    """Leave signals that go to all processes of a job to the parent of this worker, with which it ends."""
    for signum in ENDING:
        signal.signal(signum, signal.SIG_IGN)


def is_worker() -> bool:
    """Tell whether a process is being spawned that runs the program of its parent once more."""
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))
