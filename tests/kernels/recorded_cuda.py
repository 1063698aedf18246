"""A fake GPU whose CUDA graphs compute: what PyTorch captures is recorded, and its replays run it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import fake_cuda
from benchmarks.gpu.fake import fake_gpu
from tests.training.recorded import Recording

__all__ = ["recorded_gpu"]


class RecordedGraph(fake_cuda.CUDAGraph):
    """A graph that holds operators with their tensors."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.recording = Recording()

    def replay(self) -> None:
        super().replay()
        self.recording.replay()


@contextmanager
def _graph(captured: RecordedGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    with fake_cuda.graph(captured), captured.recording:
        yield
    captured.recording.undo()


@contextmanager
def recorded_gpu() -> Iterator[None]:
    """Let tensors say that they are on a GPU, and CUDA graphs run again what they have captured.

    PyTorch's operators compute for real, Triton's kernels do not: sparsify with ``backend="gather"``.
    """
    with (
        fake_gpu("h100", compiles=False),
        mock.patch.object(torch.cuda, "CUDAGraph", RecordedGraph),
        mock.patch.object(torch.cuda, "graph", _graph),
    ):
        yield
