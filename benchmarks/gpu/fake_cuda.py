"""What ``torch.cuda`` says of a card that is not there.

Streams do nothing, events are clocks of the host, a captured graph is the code that ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from .fake_cards import Card

__all__ = ["CUDAGraph", "Event", "Stream", "fake_cuda", "graph", "stream"]

DEVICE = torch.device("cuda", 0)


class Event:
    """An event that the host's clock stamps."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.moment = 0.0

    def record(self, stream: Any = None) -> None:
        """Remember now."""
        self.moment = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds until another event."""
        return 1e3 * (end.moment - self.moment)

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return that all is done."""
        return True

    def wait(self, stream: Any = None) -> None:
        """Return at once."""


class Stream:
    """A stream in which everything is done at once."""

    device, cuda_stream, stream_id = DEVICE, 0, 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def synchronize(self) -> None:
        """Return at once."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def wait_event(self, event: Event) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event of now."""
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        """Return that all is done."""
        return True


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Make a stream the current one."""
    before, _now.stream = _now.stream, chosen or _now.stream
    try:
        yield
    finally:
        _now.stream = before


class CUDAGraph:
    """A graph whose capture ran the code and whose replay does nothing but count."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.replays = 0

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """Say from now on that a capture is going on."""
        _now.capturing = True

    def capture_end(self) -> None:
        """Say so no more."""
        _now.capturing = False

    def replay(self) -> None:
        """Count."""
        self.replays += 1

    def reset(self) -> None:
        """Forget."""

    def pool(self) -> tuple[int, int]:
        """Return an identifier of memory."""
        return (0, 0)


_now = SimpleNamespace(capturing=False, stream=Stream())


@contextmanager
def graph(captured: CUDAGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Run the block as what a graph captures."""
    captured.capture_begin()
    try:
        yield
    finally:
        captured.capture_end()


def fake_cuda(card: Card) -> dict[str, Any]:
    """Return what replaces the names of ``torch.cuda``."""
    nothing, zero = (lambda *args, **kwargs: None), (lambda *args, **kwargs: 0)
    properties = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        total_memory=card.memory,
        multi_processor_count=card.processors,
        shared_memory_per_block_optin=card.shared,
        warp_size=32,
        regs_per_multiprocessor=65536,
    )
    facts = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": card.name,
        "get_device_capability": card.capability,
        "get_device_properties": properties,
        "mem_get_info": (card.memory, card.memory),
        "memory_stats": {},
        "graph_pool_handle": (0, 0),
    }
    names: dict[str, Any] = {name: (lambda *args, value=value, **kwargs: value) for name, value in facts.items()}
    names |= dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "init"), nothing)
    names |= dict.fromkeys(("_lazy_init", "manual_seed", "manual_seed_all", "set_rng_state"), nothing)
    names |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), zero)
    names |= dict.fromkeys(("max_memory_reserved",), zero)
    names |= {"current_stream": lambda *args: _now.stream, "default_stream": lambda *args: _now.stream}
    names |= dict.fromkeys(("device", "device_of"), lambda *args, **kwargs: nullcontext())
    names |= {"Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph}
    names |= {"stream": stream, "profiler": SimpleNamespace(start=nothing, stop=nothing)}
    names |= {"get_rng_state": lambda *args: torch.get_rng_state()}
    names |= {"default_generators": (SimpleNamespace(clone_state=nothing, graphsafe_set_state=nothing),)}
    names |= {"is_current_stream_capturing": lambda: _now.capturing}
    return names
