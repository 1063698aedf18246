"""CUDA graphs of whole training steps: one queue, one pool of memory, and the reasons why there are none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from patchsparse.capturing import undisturbed
from spatspark_fast.training.captured import Graphs, Taken
from spatspark_fast.training.options import Graph

__all__ = ["CudaGraphs", "choose_graphs"]


def choose_graphs(asked: Graph, device: torch.device, devices: int, say: Callable[[str], None]) -> Graphs | None:
    """Return what captures the steps of a training, or None where they run kernel by kernel; ``say`` is told why."""
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return None
    why = None
    if device.type != "cuda":
        why = f"a CUDA graph needs a GPU, and training runs on {device.type}"
    elif devices > 1:
        why = f"{devices} devices exchange gradients in a step, which no graph here holds"
    if why is None:
        return CudaGraphs(device)
    say(f"Training steps run kernel by kernel, without a CUDA graph: {why}")
    return None


class CudaGraphs:
    """Capture steps in one queue of their own; all graphs share one pool of memory.

    Steps that are not captured run in the same queue, so that autograd's nodes of the weights belong to it. No tensor
    of a graph is read by another one, so that one may use memory that another has written.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.held = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let kernels run one by one in the queue of the captures, after and before all of the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def capture(self, run: Callable[[], Taken]) -> tuple[Callable[[], None], Taken]:
        """Return a function that replays ``run``, and what its replays write."""
        graph = torch.cuda.CUDAGraph()
        with undisturbed(self.device):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.device)
            # Other threads send the next batches meanwhile, which only a capture of this thread alone allows.
            with (
                self.beside(),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                taken = run()
        self.held += max(torch.cuda.memory_reserved(self.device) - before, 0)
        return graph.replay, taken

    def send(self, numbers: Tensor, place: Tensor) -> None:
        """Copy numbers of the CPU to their place on the device; from pageable memory that would wait for it."""
        place.copy_(numbers.pin_memory(), non_blocking=True)

    @contextmanager
    def same_dice(self) -> Iterator[None]:
        """Leave the random generators of the CPU and the device as they were before."""
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            yield

    def short_of_memory(self) -> bool:
        """Tell whether less memory is free than the graphs hold, which is what a step needs by itself."""
        spare = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) - self.held
        return torch.cuda.mem_get_info(self.device)[0] + max(spare, 0) < self.held

    def forget(self) -> None:
        """Give the memory of graphs back that are no more."""
        self.pool = torch.cuda.graph_pool_handle()
        self.held = 0
        gc.collect()
        torch.cuda.empty_cache()
