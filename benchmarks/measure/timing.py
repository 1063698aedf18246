"""Time several ways of doing the same thing in turn, and compare them round by round; but only what was checked."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .device import has_gpu, wait

__all__ = [
    "GATE",
    "Gate",
    "Ratio",
    "Timing",
    "calls_to_fill",
    "check_close",
    "check_parity",
    "in_turn",
    "peak_bytes",
    "said",
]

FILL, MOST = 0.02, 1000  # seconds that one timing on a GPU fills with calls, and how many they are at most


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratio of two ways, round by round; above 1 the first is slower."""

    median: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Ratio:
        """Return a ratio that has no spread: of bytes or of counts."""
        return cls(value, value, value)

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of every way in every round; measured in turn: a drift of the machine meets all alike."""

    seconds: dict[str, list[float]]

    def median(self, way: str) -> float:
        """Return the median seconds of one way."""
        return statistics.median(self.seconds[way])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Return how many times longer ``slow`` takes than ``fast``."""
        pairs = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        if len(pairs) == 1:
            return Ratio.exact(pairs[0])
        low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
        return Ratio(median, low, high)

    def compare(
        self, way: str, against: str, unit: str = "s", calls: int = 1
    ) -> tuple[Ratio, tuple[float, float], str]:
        """Return what a row says of two ways: the ratio of ``against`` to ``way``, both medians, and their unit.

        Args:
            way: the one that the ratio speaks for.
            against: its rival.
            unit: ``"s"`` or ``"ms"``.
            calls: how many runs of what is compared make one call.
        """
        factor = {"s": 1.0, "ms": 1e3}[unit] / calls
        return self.ratio(against, way), (self.median(way) * factor, self.median(against) * factor), unit

    def summed(self, way: str, parts: Sequence[str]) -> Timing:
        """Return a timing that has ``way`` too, the sum of its ``parts`` in each round."""
        sums = [float(sum(seconds)) for seconds in zip(*(self.seconds[part] for part in parts), strict=True)]
        return Timing(self.seconds | {way: sums})


class Gate:
    """Remember which parity checks have passed; nothing is timed and no row is made before one has.

    Each benchmark calls ``close`` first, so that no check serves for another's figures.
    """

    def __init__(self) -> None:
        self._errors: dict[str, float] = {}

    def close(self) -> None:
        """Forget what has passed."""
        self._errors = {}

    def let(self, what: str, error: float, limit: float) -> None:
        """Note that ``what`` differs by ``error``; raise AssertionError if that is above ``limit``, or NaN."""
        if not error <= limit:
            self._errors = {}
            raise AssertionError(f"{what} differs by {error:.2e} (limit {limit:.0e}); no figure is given")
        self._errors[what] = error

    def worst(self) -> float:
        """Return the largest difference that passed; raise AssertionError if nothing was checked."""
        if not self._errors:
            raise AssertionError("nothing was compared before this; no figure is given")
        return max(self._errors.values())


GATE = Gate()


def check_parity(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Open the gate if the results agree, by the norm of their difference; else raise AssertionError."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name} is {tuple(actual.shape)}, not {tuple(expected.shape)}; no figure is given")
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    GATE.let(name, float(difference), tolerance)


def check_close(name: str, actual: float, expected: float, tolerance: float) -> None:
    """Open the gate if two numbers agree relatively; else raise AssertionError."""
    GATE.let(name, abs(actual - expected) / max(abs(expected), 1e-30), tolerance)


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 2) -> Timing:
    """Run every way in turn, round by round; return the seconds of a call in the counted rounds.

    On a CPU a way is called once in a round. On a GPU it is called as often as fills `FILL` seconds by its time in the
    last warm-up, so that neither the wait at the end counts nor slow ways take minutes.

    Raises AssertionError if no parity check has passed.
    """
    GATE.worst()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    calls = dict.fromkeys(ways, 1)
    for index in range(warmup + rounds):
        for name, run in ways.items():
            wait()
            started = time.perf_counter()
            for _ in range(calls[name]):
                run()
            wait()
            took = (time.perf_counter() - started) / calls[name]
            if index >= warmup:
                seconds[name].append(took)
            elif index == warmup - 1 and has_gpu():
                calls[name] = calls_to_fill(took)
    return Timing(seconds)


@contextmanager
def said(what: str) -> Iterator[None]:
    """Print how many seconds something took: on a lent machine one must know where they went."""
    began = time.perf_counter()
    try:
        yield
    finally:
        sys.stdout.write(f"{time.perf_counter() - began:7.1f} s  {what}\n")
        sys.stdout.flush()


def calls_to_fill(seconds: float) -> int:
    """Return how many calls of so many seconds fill `FILL`, from 1 to `MOST`."""
    return min(MOST, max(1, round(FILL / max(seconds, 1e-9))))


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Return the most bytes allocated at once by PyTorch during ``run``, above what was held before."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    profiler = record.profiler
    if profiler is None or profiler.kineto_results is None:
        raise RuntimeError("torch.profiler recorded nothing")
    held = peak = 0
    events: list[Any] = profiler.kineto_results.events()  # their type stub lacks nbytes
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
