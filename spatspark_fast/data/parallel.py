"""Map a function over many items in worker processes, in order, holding few results at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from types import ModuleType
from typing import TypeVar

__all__ = ["ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[list[Item]], list[Result]], items: Iterable[Item], workers: int, batch: int
) -> Iterator[Result]:
    """Yield the results of ``function`` for all items, in their order.

    ``function`` takes and gives lists of at most ``batch``. At most ``3 * workers + 1`` batches exist at
    once, so memory does not grow with the number of items. ``workers`` = 0 works in this process; otherwise
    ``function`` must be picklable and no part of the program itself, since processes are spawned (a fork would copy
    locks that HDF5 holds) and do not run the program once more.
    """
    source = iter(items)
    batches = iter(lambda: list(islice(source, batch)), [])
    if workers <= 0:
        for one in batches:
            yield from function(one)
        return
    waiting: deque[Future[list[Result]]] = deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        for one in batches:
            with _program_hidden():
                waiting.append(pool.submit(function, one))
            if len(waiting) > 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _program_hidden() -> Iterator[None]:
    """Let processes start without the program that runs here.

    Else each of them would import it, and start the same work, where nobody wrote ``if __name__ == "__main__"``.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends: a killed parent cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
