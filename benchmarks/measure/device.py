"""The one place of the benchmarks that talks to a device: which one, its driver, waiting, one side stream, graphs.

Everything on a GPU runs on one side stream, from the first tensor on. A backward pass is run where its forward pass
was, so that what was built there can be captured in a CUDA graph.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["aside", "capture", "device", "driver", "has_gpu", "profiled", "wait"]

WARM = 3  # runs before a capture: libraries choose their kernels, and caches are filled


def has_gpu() -> bool:
    """Return whether there is a GPU to measure."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if has_gpu():
        torch.cuda.synchronize()


@cache
def driver() -> str:
    """Return the version of the GPU's driver, or "" where none can be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.split("\n")[0].strip() if run.returncode == 0 else ""


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def aside() -> Iterator[None]:
    """Run on the side stream, if there is a GPU."""
    if not has_gpu() or torch.cuda.current_stream() == _stream():
        yield
        return
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        yield
    torch.cuda.current_stream().wait_stream(_stream())


def capture(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """Return what replays ``run`` as one CUDA graph, and the tensors that a replay writes.

    Raises:
        RuntimeError: if it cannot be captured, with the reason.
    """
    with aside():
        for _ in range(WARM):
            run()
        wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_stream()):
            results = run()
    return graph.replay, results


@contextmanager
def profiled() -> Iterator[None]:
    """Let a profiler that waits for its start see what runs inside."""
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()
