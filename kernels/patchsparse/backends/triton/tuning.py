"""Choice among configurations: the default, or the fastest measured one that computes the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Measured", "Tuner", "best", "tune"]


@dataclass(frozen=True)
class Measured:
    """What tuning found for one configuration.

    Attributes:
        config: the configuration.
        seconds: median of the repetitions; infinity if it was dropped.
        error: largest deviation from the first configuration, relative to its largest value.
    """

    config: Any
    seconds: float
    error: float


@dataclass
class Tuner:
    """Remember, per kind of call, what was measured; ``seconds`` is the time that tuning took."""

    repetitions: int = 5
    found: dict[Hashable, list[Measured]] = field(default_factory=dict)
    seconds: float = 0.0

    def best(self, key: Hashable) -> Any | None:
        """Return the fastest configuration measured for ``key``, or None if it was never measured."""
        found = self.found.get(key)
        return None if found is None else min(found, key=lambda m: m.seconds).config

    def measure(self, key: Hashable, configs: Sequence[Any], run: Callable[[Any], Tensor]) -> None:
        """Run every configuration and remember its time; one whose result deviates from the first's is dropped."""
        begun = time.perf_counter()
        reference = run(configs[0])
        scale = reference.float().abs().amax().clamp(min=1e-30)
        limit = 1e-4 if reference.dtype == torch.float32 else 4 * torch.finfo(reference.dtype).eps
        found = []
        for config in configs:
            error = float(((run(config).float() - reference.float()).abs().amax() / scale).item())
            passed = error <= max(limit, 2e-3)  # NaN does not pass; TF32 rounds to 10 bits
            found.append(Measured(config, self._time(run, config) if passed else float("inf"), error))
        self.found[key] = found
        self.seconds += time.perf_counter() - begun

    def _time(self, run: Callable[[Any], Tensor], config: Any) -> float:
        seconds = []
        for _ in range(self.repetitions):
            device = run(config).device
            _wait(device)
            begun = time.perf_counter()
            for _ in range(4):
                run(config)
            _wait(device)
            seconds.append((time.perf_counter() - begun) / 4)
        return sorted(seconds)[len(seconds) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What was measured in this process (a memo), and whether calls in this context may measure.
_tuner = Tuner()
_tuning: ContextVar[bool] = ContextVar("patchsparse_triton_tuning", default=False)


@contextmanager
def tune(repetitions: int = 5) -> Iterator[Tuner]:
    """Measure every kind of call that is met inside the ``with`` block for the first time; later calls use the best.

    Run one training step in it to warm up. What was found serves the whole process, also under CUDA graph capture,
    where nothing is ever measured. Without it the default configurations are used.

    Yields:
        the process's :class:`Tuner`: ``found`` per kind of call, ``seconds`` spent.

    Example::

        with tune() as tuner:
            loss(model(x)).backward()
        print(f"{len(tuner.found)} kinds of call measured in {tuner.seconds:.1f} s")
    """
    _tuner.repetitions = repetitions
    token = _tuning.set(True)
    try:
        yield _tuner
    finally:
        _tuning.reset(token)


def best(key: Hashable, configs: Sequence[Any], run: Callable[[Any], Tensor]) -> Tensor:
    """Return ``run`` of the best configuration known for ``key``; measure first if inside :func:`tune`."""
    chosen = _tuner.best(key)
    if chosen is None and _tuning.get() and not _capturing():
        _tuner.measure(key, configs, run)
        chosen = _tuner.best(key)
    return run(configs[0] if chosen is None else chosen)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
