"""Graphs for machines without a GPU: they record operators with their tensors, and run them again.

As in a CUDA graph nothing is computed by a capture (what it moved is put back), tensors keep their place, and what
reads a value into Python, brings data of the host into the step, or makes shapes from values ends the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spatspark_fast.training.captured import Taken

__all__ = ["ForbiddenError", "RecordedGraphs", "Recording"]

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero", "item")
HOST = ("lift_fresh", "_pin_memory")  # how numbers of Python enter a tensor


class ForbiddenError(RuntimeError):
    """Say that a CUDA graph could not hold an operator."""


class _Call(NamedTuple):
    operator: Any
    args: Any
    kwargs: Any
    grad: bool  # on which PyTorch's choice of a kernel depends
    results: list[Tensor]  # those in memory of their own


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Record operators; keep what tensors from before the capture held before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse(func, args)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moves = func._schema.is_mutable or "batch_norm" in func.__name__  # whose schema hides that it does
        for tensor in inputs if moves else ():
            self._keep(tensor)
        results = func(*args, **kwargs)
        own = {_memory(tensor) for tensor in inputs}
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        fresh = [tensor.detach() for tensor in tensors if _memory(tensor) not in own]
        self._made.update(map(_memory, fresh))
        if fresh or moves:
            self.calls.append(_Call(func, args, kwargs, torch.is_grad_enabled(), fresh))
        return results

    def _keep(self, tensor: Tensor) -> None:
        """Remember the values of a tensor that is older than the capture and about to change."""
        if _memory(tensor) not in self._made | self.before.keys():
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())  # type: ignore[call-overload]
            self.before[_memory(tensor)] = (whole, whole.clone())

    def undo(self) -> None:
        """Put back what was moved, and spoil all results: a replay that reads what it has not computed would show."""
        for whole, values in self.before.values():
            whole.copy_(values)
        for call in self.calls:
            for place in call.results:
                if place.is_floating_point():
                    place.data.fill_(torch.nan)  # autograd does not count this as a change

    def replay(self) -> None:
        """Run all operators again, in the same memory."""
        for operator, args, kwargs, grad, places in self.calls:
            with torch.set_grad_enabled(grad), torch._C._AutoDispatchBelowAutograd():
                results = operator(*args, **kwargs)
            own = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            fresh = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and _memory(leaf) not in own]
            for place, result in zip(places, fresh, strict=True):
                place.data.copy_(result)


def refuse(func: Any, args: Any) -> None:
    """Raise `ForbiddenError` for an operator that waits for the device, or that reads or makes what is not on it."""
    name = func.overloadpacket.__name__
    if name in READS:
        raise ForbiddenError(f"{name} reads a value of the device")
    if name in HOST:
        raise ForbiddenError(f"{name} brings numbers of the host into the step")
    indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
    if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
        raise ForbiddenError(f"{name} by a mask makes a shape from values")
    if name == "repeat_interleave" and len(args) < 2:
        raise ForbiddenError(f"{name} makes a shape from values")


class RecordedGraphs:
    """Capture steps on a CPU, as `CudaGraphs` does on a GPU; count what happens."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.eager = 0
        self.launches: list[int] = []
        self.short = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.eager += 1
        yield

    def capture(self, run: Callable[[], Taken]) -> tuple[Callable[[], None], Taken]:
        recording = Recording()
        state = torch.get_rng_state()
        try:
            with recording:
                taken = run()
        finally:
            recording.undo()
            torch.set_rng_state(state)
        self.captures += 1
        self.launches.append(len(recording.calls))

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay, taken

    def send(self, numbers: Tensor, place: Tensor) -> None:
        place.copy_(numbers)

    @contextmanager
    def same_dice(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            yield

    def short_of_memory(self) -> bool:
        return self.short

    def forget(self) -> None:
        pass
