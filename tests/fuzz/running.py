"""Try inputs in forked processes, so that a crash, a hang or a leak is counted and ends nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

from .outcomes import Suite, Verdict

__all__ = ["Limits", "prepared", "tried"]

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Limits:
    """Say what is too much.

    Args:
        seconds: of one input, by the clock
        space: bytes of address space of a process beyond what it begins with; more is refused by the system
        peak: bytes by which the memory of a process may grow at one input
        growth: bytes by which it may have grown after a whole batch, once a third of it is done
        batch: inputs tried by one process
    """

    seconds: float = 60.0
    space: int = 4 << 30
    peak: int = 1 << 30
    growth: int = 512 << 20
    batch: int = 60


@dataclass
class _Worker:
    seeds: list[int]
    process: BaseProcess
    answers: Connection
    since: float = field(default_factory=time.monotonic)
    done: int = 0
    silent: bool = False


def prepared(suite: Suite, folder: Path, seconds: float = 300) -> None:
    """Write what a suite's inputs are made of, in a process of its own."""
    folder.mkdir()
    process = _forked(_prepare, suite, folder)
    process.join(seconds)
    if process.exitcode != 0:
        raise RuntimeError(
            f"{folder.name}: what the inputs are made of could not be made, exit code {process.exitcode}"
        )


def tried(
    name: str, suite: Suite, folder: Path, seeds: Iterator[int], jobs: int, limits: Limits
) -> Iterator[tuple[int, Verdict]]:
    """Yield each seed with what became of its input; ``seeds`` may be endless."""
    workers: list[_Worker] = []
    batches = _batches(seeds, limits.batch)
    try:
        while True:
            while len(workers) < jobs and (batch := next(batches, None)):
                workers.append(_started(name, suite, folder, batch, limits))
            if not workers:
                return
            wait([worker.answers for worker in workers], timeout=0.5)
            for worker in list(workers):
                yield from _heard(worker)
                verdict = _failed(worker, limits)
                if verdict is not None:
                    yield worker.seeds[worker.done], verdict
                    worker.done += 1
                if verdict is not None or worker.done == len(worker.seeds):
                    workers.remove(worker)
                    _ended(worker)
                    if rest := worker.seeds[worker.done :]:
                        workers.append(_started(name, suite, folder, rest, limits))
    finally:
        for worker in workers:
            _ended(worker)


def _batches(seeds: Iterator[int], size: int) -> Iterator[list[int]]:
    while batch := list(itertools.islice(seeds, size)):
        yield batch


def _started(name: str, suite: Suite, folder: Path, seeds: list[int], limits: Limits) -> _Worker:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _forked(_serve, name, suite, folder, seeds, theirs, limits)
    theirs.close()
    return _Worker(seeds, process, ours)


def _heard(worker: _Worker) -> Iterator[tuple[int, Verdict]]:
    """Yield what a process has said so far."""
    while worker.done < len(worker.seeds) and not worker.silent and worker.answers.poll():
        try:
            verdict = worker.answers.recv()
        except (EOFError, OSError):  # it is dead, and all that it said has been read
            worker.silent = True
        else:
            seed, worker.since = worker.seeds[worker.done], time.monotonic()
            worker.done += 1
            yield seed, verdict


def _failed(worker: _Worker, limits: Limits) -> Verdict | None:
    """Return the verdict on the input at hand if the process died of it or does not answer."""
    if worker.done == len(worker.seeds):
        return None
    if worker.silent:
        worker.process.join()
        code = worker.process.exitcode or 0
        return Verdict("crash", signal.Signals(-code).name if code < 0 else f"the process ended with {code}")
    if time.monotonic() - worker.since > limits.seconds:
        return Verdict("hang", f"no answer in {limits.seconds:g} s")
    return None


def _ended(worker: _Worker) -> None:
    """End a process with all that it has started."""
    pid = worker.process.pid
    if worker.done == len(worker.seeds):
        worker.process.join(5)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    worker.process.join()
    worker.answers.close()


def _forked(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = _FORK.Process(target=target, args=arguments)
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; none of ours computes here
        warnings.simplefilter("ignore")
        process.start()
    return process


def _prepare(suite: Suite, folder: Path) -> None:
    _alone()
    suite.prepare(folder)


def _serve(name: str, suite: Suite, folder: Path, seeds: Sequence[int], answers: Connection, limits: Limits) -> None:
    """Try the inputs one after another, and say what became of each."""
    _alone()
    space = _memory("VmSize") + limits.space
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    scratch = folder / f"scratch-{os.getpid()}"
    begun = 0
    for number, seed in enumerate(seeds):
        scratch.mkdir()
        os.chdir(scratch)
        before = _memory("VmHWM")
        verdict = suite.attempt(Random(f"{name} {seed}"), folder, scratch)
        if number == limits.batch // 3:
            begun = _memory("VmRSS")
        if verdict.outcome in ("right", "refused"):
            if _memory("VmHWM") - before > limits.peak:
                verdict = Verdict("memory", f"one input took more than {limits.peak >> 20} MiB")
            elif number == limits.batch - 1 and _memory("VmRSS") - begun > limits.growth:
                verdict = Verdict("memory", f"a batch left more than {limits.growth >> 20} MiB")
        os.chdir(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        answers.send(verdict)


def _alone() -> None:
    """Make this process the leader of its own group, silent, with one thread, and without core files."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(quiet, handle)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)


def _memory(name: str) -> int:
    """Return a size of this process in bytes: ``VmSize``, ``VmRSS`` (now) or ``VmHWM`` (at its peak)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))
