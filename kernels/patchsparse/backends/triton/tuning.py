"""Choice among configurations: the one that was tuned for this kind of call, or the default.

Tuned ones come from the table of the package (``tuned.py``), or from :func:`tune` in this process, which comes first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tuned import Kind, shipped

__all__ = ["Measured", "Tuner", "best", "forget", "tune"]

CALLS = 10  # that are timed as one


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

    def best(self, kind: Hashable) -> Any | None:
        """Return the fastest configuration measured for ``kind``, or None if it was never measured."""
        found = self.found.get(kind)
        return None if found is None else min(found, key=lambda m: m.seconds).config

    def measure(self, kind: Hashable, configs: Sequence[Any], run: Callable[[Any], Tensor]) -> None:
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
        self.found[kind] = found
        self.seconds += time.perf_counter() - begun

    def _time(self, run: Callable[[Any], Tensor], config: Any) -> float:
        """Return the median seconds of one call; on a GPU its own time, not that of the host which starts it."""
        device = run(config).device
        several = _repeated(run, config) if device.type != "cuda" else captured(run, config).replay
        clock = _host_seconds if device.type != "cuda" else _device_seconds
        several()
        return statistics.median(clock(several) for _ in range(self.repetitions)) / CALLS


def _repeated(run: Callable[[Any], Tensor], config: Any) -> Callable[[], None]:
    def several() -> None:
        for _ in range(CALLS):
            run(config)

    return several


def captured(run: Callable[[Any], Tensor], config: Any) -> torch.cuda.CUDAGraph:
    """Return `CALLS` calls as one CUDA graph; what they need beside the kernels was made by a call before this."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # autograd calls this in a thread of its own
        try:
            _repeated(run, config)()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _host_seconds(several: Callable[[], None]) -> float:
    begun = time.perf_counter()
    several()
    return time.perf_counter() - begun


def _device_seconds(several: Callable[[], None]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    several()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


# What was measured in this process, what is chosen for each kind of call that was met (None: the default; both are
# memos), and the `tune` blocks that are open. These are of the process, not of a thread: on a GPU backward passes run
# in threads of autograd.
_tuner = Tuner()
_chosen: dict[Hashable, Any] = {}
_open: list[object] = []
_UNMET = object()


def forget() -> None:
    """Forget what was chosen, so that the table of the package is asked again; what was measured stays."""
    shipped.cache_clear()
    _chosen.clear()
    _chosen.update({kind: _tuner.best(kind) for kind in _tuner.found})


@contextmanager
def tune(repetitions: int = 5) -> Iterator[Tuner]:
    """Measure every kind of call that is met while the block is open for the first time; later calls use the best.

    That holds for all threads, since autograd's own run the backward pass on a GPU. Run one training step in it to
    warm up. What was found serves the whole process, also under CUDA graph capture, where nothing is ever measured.
    Without it calls use the table of the package, and the defaults for what is not in it.

    Yields:
        the process's :class:`Tuner`: ``found`` per kind of call, ``seconds`` spent.

    Example::

        with tune() as tuner:
            loss(model(x)).backward()
        print(f"{len(tuner.found)} kinds of call measured in {tuner.seconds:.1f} s")
    """
    _tuner.repetitions = repetitions
    block = object()
    _open.append(block)
    try:
        yield _tuner
    finally:
        _open.remove(block)


def best(kind: Hashable, configs: Sequence[Any], run: Callable[[Any], Tensor]) -> Tensor:
    """Return ``run`` of the best configuration known for ``kind``; measure first if inside :func:`tune`.

    A kind that was met before costs one lookup. Kinds other than :class:`~.tuned.Kind` are not in the table.
    """
    chosen = _chosen.get(kind, _UNMET)
    if chosen is _UNMET or (_open and kind not in _tuner.found):
        chosen = _meet(kind, configs, run)
    return run(configs[0] if chosen is None else chosen)


def _meet(kind: Hashable, configs: Sequence[Any], run: Callable[[Any], Tensor]) -> Any | None:
    """Measure a kind of call if that is wanted, or look it up; remember and return what is chosen."""
    if _open and not _capturing():
        _tuner.measure(kind, configs, run)
        _chosen[kind] = _tuner.best(kind)
    elif kind not in _chosen:
        _chosen[kind] = shipped().choose(kind, configs) if isinstance(kind, Kind) else None
    return _chosen[kind]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
