"""Time several ways of doing the same thing in turn, and compare them pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Ratio", "Timing", "check_parity", "in_turn", "peak_bytes"]


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratio of two ways, pair by pair; above 1 the first is slower."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timing:
    """Seconds of every way in every round, measured in turn so that a drift of the machine meets all alike."""

    seconds: dict[str, list[float]]

    def median(self, way: str) -> float:
        """Return the median seconds of one way."""
        return statistics.median(self.seconds[way])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Return how many times longer ``slow`` takes than ``fast``."""
        pairs = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        low, median, high = statistics.quantiles(pairs, n=4)
        return Ratio(median, low, high)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 2) -> Timing:
    """Run every way once per round, in turn; return the seconds of the counted rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(warmup + rounds):
        for name, run in ways.items():
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return Timing(seconds)


def check_parity(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless the results agree: no speed of a wrong result is ever printed."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    if not float(difference) <= tolerance:
        raise AssertionError(f"{name} differs by {float(difference):.2e} (limit {tolerance:.0e}); no time is taken")


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most CPU bytes allocated at once by PyTorch during ``run``, above what was held before."""
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
