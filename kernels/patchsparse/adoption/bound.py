"""The grid of a model, of each thread and task its own, and the grid of a forward pass that backward computes anew."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..grid import PatchGrid

__all__ = ["Bound", "entered"]

_REPLAY_HELP = (
    "a sparsified module was recomputed during backward, outside of bind(), and the grid of its forward pass is "
    "not known. Enter bind(model, grid, checkpointing=True) when you use torch.utils.checkpoint yourself, and "
    "bind(model, None, checkpointing=True) for the dense model"
)
_COMPILED_READS_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # and no version before
_UNBOUND = cast(PatchGrid, object())
_torch: Any = torch._C  # type checkers do not know all of it


class _Here:
    """What holds in one thread.

    Attributes:
        grid: that of the innermost block; only for what a torch before 2.14 has compiled.
        replay: grid of the forward pass that activation checkpointing is recomputing, or None.
        task: the backward pass that does so, -1 for none.
    """

    def __init__(self):
        self.grid: PatchGrid | None = None
        self.replay: PatchGrid | None = None
        self.task = -1


class _Thread(threading.local):
    def __init__(self):
        self.here = _Here()


class _Before(NamedTuple):
    """What a block leaves to be restored at its end."""

    token: contextvars.Token[PatchGrid | None]
    replay: PatchGrid | None
    task: int


class Bound:
    """Hold the grid that a model runs on in this thread, or in this task of asyncio; ``None`` means none.

    A deep copy or a pickle holds none, also inside of a block.
    """

    def __init__(self):
        self._context: contextvars.ContextVar[PatchGrid | None] = contextvars.ContextVar("grid")
        self._thread = _Thread()
        # Threads whose last forward pass ran on a grid that a recomputation, in whatever thread, cannot find.
        self._unsafe: set[int] = set()

    @property
    def grid(self) -> PatchGrid | None:
        """The grid of the innermost block, or None."""
        return self._context.get(None)

    @property
    def replay(self) -> PatchGrid | None:
        """The grid of the forward pass that activation checkpointing is recomputing in this thread, or None."""
        return self._thread.here.replay

    def current(self) -> PatchGrid | None:
        """Return the grid to run on, or None for the dense path.

        Raises:
            RuntimeError: if called by a recomputation during backward whose grid is not known.
        """
        if torch.compiler.is_compiling():  # a graph cannot ask for the task; `replay` is reset when backward ends
            here = self._thread.here
            if here.replay is not None:
                return here.replay
            return self._context.get(None) if _COMPILED_READS_CONTEXT else here.grid
        task = _torch._current_graph_task_id()
        if task == -1:
            grid = self._context.get(None)
            if grid is None and self._unsafe:
                self._ran_densely()
            return grid
        here = self._thread.here
        if task == here.task:
            return here.replay
        grid = self._in_backward()
        if grid is None and self._unsafe:
            raise RuntimeError(_REPLAY_HELP)
        return grid

    def _in_backward(self) -> PatchGrid | None:
        """Return the grid bound here, or where ``backward`` was called if this is a thread of autograd's own."""
        grid = self._context.get(_UNBOUND)
        if grid is _UNBOUND and _torch._is_key_in_tls("context"):  # where torch puts it, from 2.14 on
            grid = _torch._get_obj_in_tls("context").get(self._context, None)
        return None if grid is _UNBOUND else grid

    def _ran_densely(self) -> None:
        """Note that the last forward pass of this thread needs no grid; forget those of threads that have ended."""
        self._unsafe.discard(threading.get_ident())
        if self._unsafe:
            self._unsafe.intersection_update([thread.ident for thread in threading.enumerate()])

    def enter(self, grid: PatchGrid | None, replayable: bool) -> _Before:
        """Switch to ``grid`` and return what was before; ``replayable`` says that recomputation will find the grid."""
        here, task = self._thread.here, _torch._current_graph_task_id()
        if task == -1:
            here.replay, here.task = None, -1  # may be left over from a backward pass that raised
        before = _Before(self._context.set(grid), here.replay, here.task)
        here.grid = grid
        if task != -1:  # a hook of the user's, say, in the middle of a recomputation
            here.replay, here.task = grid, task
        if grid is not None and not replayable:
            self._unsafe.add(threading.get_ident())
        return before

    def leave(self, grid: PatchGrid | None, before: _Before) -> None:
        """Switch from ``grid`` to what was before."""
        here = self._thread.here
        here.replay, here.task = before.replay, before.task
        try:
            self._context.reset(before.token)
        except ValueError:  # it is left in another context than entered, as an asynchronous generator may be
            if self._context.get(None) is grid:
                previous = before.token.old_value
                self._context.set(None if previous is contextvars.Token.MISSING else previous)
        here.grid = self._context.get(None)

    def replay_with(self, grid: PatchGrid | None) -> None:
        """Make recomputation in this thread use ``grid`` until the backward pass ends or this is called again."""
        here, task = self._thread.here, _torch._current_graph_task_id()
        if task != here.task:
            engine = cast(Any, torch.autograd.Variable)._execution_engine
            engine.queue_callback(partial(_end_replay, here, task))  # called by any of the threads
        here.replay, here.task = grid, task

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        return Bound()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _end_replay(here: _Here, task: int) -> None:
    if here.task == task:
        here.replay, here.task = None, -1


@contextmanager
def entered(bounds: Sequence[Bound], grid: PatchGrid | None, replayable: bool) -> Iterator[None]:
    """Run a block on ``grid``; if it shall be ``replayable``, backward finds the grid again wherever it recomputes."""
    before = [bound.enter(grid, replayable) for bound in bounds]
    try:
        with _remember(bounds, grid) if replayable else nullcontext():
            yield
    finally:
        for bound, was in zip(bounds, before, strict=True):
            bound.leave(grid, was)


def _remember(bounds: Sequence[Bound], grid: PatchGrid | None) -> torch.autograd.graph.saved_tensors_hooks:
    """Attach ``grid`` to every tensor saved for backward in the block.

    A checkpoint saves its inputs under these hooks, and unpacks them right before it recomputes, in whatever thread.
    At that moment the modules must know the grid again, and so must checkpoints inside of what is recomputed: the
    hooks are pushed once more, and autograd drops them with all that its node has set in the thread.
    """

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        return tensor, tensor._version

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:  # where there are hooks, autograd does not look
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tensor.dtype} {tuple(tensor.shape)} is at version {tensor._version}; expected version {version}"
            )
        if _torch._current_graph_task_id() != -1:
            for bound in bounds:
                bound.replay_with(grid)
            own = _torch._autograd
            if own._saved_tensors_hooks_is_enabled() and own._top_saved_tensors_default_hooks(False) != (pack, unpack):
                own._push_saved_tensors_default_hooks(pack, unpack)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
