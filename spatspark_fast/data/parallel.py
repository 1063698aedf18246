"""Map a function over many items in worker processes, in order, holding few results at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
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
    ``function`` must be picklable, since processes are spawned (a fork would copy locks that HDF5 holds).
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
            waiting.append(pool.submit(function, one))
            if len(waiting) > 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends: a killed parent cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
