"""Which grid a sparsified model runs on: one :class:`Binding` per model, switched by :func:`bind`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..grid import PatchGrid
from ..ops.joined_norm import AllGather

__all__ = ["Binding", "bind", "join_statistics"]

_REPLAY_HELP = (
    "a sparsified module was recomputed during backward, outside of bind(), and the grid of its forward pass is "
    "not known. Enter bind(model, grid, checkpointing=True) when you use torch.utils.checkpoint yourself"
)
_RECOMPUTED = ("grad_checkpointing", "gradient_checkpointing")  # attributes of modules that recompute in backward


class Binding:
    """Hold the grid that the modules of one sparsified model run on; ``None`` means the plain dense model.

    Every Patch module of a model refers to the same Binding, as a plain attribute that is no part of the state dict.
    A deep copy or a pickle starts unbound, also inside a :func:`bind` block; a pickle also without ``all_gather``.

    Attributes:
        backend: name of the engine that the modules ask for.
        fuse: whether norms run as one operator with what follows them; None does it where it is faster.
        all_gather: joins the statistics of batch norms over processes, see :func:`join_statistics`; None does not.
        grid: grid of the innermost :func:`bind` block, or None.
        replay: grid of the forward pass that activation checkpointing is recomputing, or None.
    """

    def __init__(self, backend: str = "auto", fuse: bool | None = None):
        self.backend = backend
        self.fuse = fuse
        self.all_gather: AllGather | None = None
        self.grid: PatchGrid | None = None
        self.replay: PatchGrid | None = None
        self._replay_task = -1
        self._unsafe = False  # a forward pass ran on a grid that a recomputation cannot find, and none densely since

    def current(self) -> PatchGrid | None:
        """Return the grid to run on, or None for the dense path.

        Raises:
            RuntimeError: if called by a recomputation during backward whose grid is not known.
        """
        if torch.compiler.is_compiling():  # a graph cannot ask for the task; `replay` is reset when backward ends
            return self.grid if self.replay is None else self.replay
        task = torch._C._current_graph_task_id()
        if task == -1:
            if self.grid is None:
                self._unsafe = False
            return self.grid
        if task == self._replay_task:
            return self.replay
        if self.grid is None and self._unsafe:
            raise RuntimeError(_REPLAY_HELP)
        return self.grid

    def enter(self, grid: PatchGrid | None, replayable: bool) -> PatchGrid | None:
        """Switch to ``grid`` and return the one before; ``replayable`` says that recomputation will find the grid."""
        previous, self.grid = self.grid, grid
        if torch._C._current_graph_task_id() == -1:
            self.replay, self._replay_task = None, -1  # may be left over from a backward pass that raised
        self._unsafe |= grid is not None and not replayable
        return previous

    def replay_with(self, grid: PatchGrid | None) -> None:
        """Make recomputation use ``grid`` until the running backward pass ends or this is called again."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return
        if task != self._replay_task:
            engine = cast(Any, torch.autograd.Variable)._execution_engine
            engine.queue_callback(self._end_replay)
        self.replay, self._replay_task = grid, task

    def _end_replay(self) -> None:
        self.replay, self._replay_task = None, -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        memo[id(self)] = copy = Binding(self.backend, self.fuse)
        copy.all_gather = self.all_gather
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self.backend, "fuse": self.fuse}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["backend"], state.get("fuse"))


def bindings_of(model: nn.Module) -> list[Binding]:
    """Return every distinct Binding in ``model``, in module order."""
    return _held_by(model)[0]


def _held_by(model: nn.Module) -> tuple[list[Binding], bool]:
    """Return every distinct Binding in ``model``, in module order, and whether a module says that it is recomputed.

    Each step asks, so that this is one walk that never asks a module for an attribute it does not have, which it would
    look for in vain among its parameters.
    """
    found: dict[int, Binding] = {}
    seen, left, recomputed = set(), [model], False
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        own, kind = module.__dict__, type(module)
        binding = own.get("patch_binding")
        if isinstance(binding, Binding):
            found[id(binding)] = binding
        for name in _RECOMPUTED:
            if (name in own or hasattr(kind, name)) and getattr(module, name) is True:
                recomputed = True
        left += [child for child in reversed(own["_modules"].values()) if child is not None]
    return list(found.values()), recomputed


def join_statistics(model: nn.Module, all_gather: AllGather | None) -> None:
    """Let the batch norms of sparsified parts of ``model`` take statistics over the active pixels of all processes.

    It concerns ``BatchNorm2d`` and timm's ``BatchNormAct2d`` while a grid is bound and they train. Every process must
    run the same norms in the same order; their numbers of active patches may differ, and be 0.

    Args:
        model: module that holds at least one sparsified part.
        all_gather: see :func:`patchsparse.patch_batch_norm_act`; None lets each process have its own statistics again.

    Raises:
        ValueError: if no part of ``model`` has been sparsified.
    """
    for binding in _some_of(bindings_of(model), model):
        binding.all_gather = all_gather


def _some_of(bindings: list[Binding], model: nn.Module) -> list[Binding]:
    if not bindings:
        raise ValueError(f"no part of {type(model).__name__} is sparsified; call sparsify(model) first")
    return bindings


@contextmanager
def bind(model: nn.Module, grid: PatchGrid | None, *, checkpointing: bool | None = None) -> Iterator[nn.Module]:
    """Run every sparsified part of ``model`` on ``grid`` inside the block.

    Leaving the block brings back what was bound before. Blocks nest, also for the same model; models with different
    grids may alternate. ``model`` may be wrapped (DistributedDataParallel, ``torch.compile``) or hold several
    sparsified parts. ``backward`` may come after the block.

    Args:
        model: module that holds at least one sparsified part.
        grid: the grid of the packed input; None runs the plain dense model inside the block.
        checkpointing: whether activation checkpointing will recompute parts of the forward pass in backward.
            None looks for it: any submodule whose attribute ``grad_checkpointing`` or
            ``gradient_checkpointing`` is True, as timm and other libraries set it. Pass True when you call
            ``torch.utils.checkpoint`` yourself.

    Raises:
        ValueError: if no part of ``model`` has been sparsified.
        TypeError: if ``grid`` is neither a PatchGrid nor None.
    """
    if grid is not None and not isinstance(grid, PatchGrid):
        raise TypeError(f"grid must be a PatchGrid or None, got {type(grid).__name__}; see PatchGrid.from_active")
    bindings, recomputed = _held_by(model)
    bindings, replayable = _some_of(bindings, model), recomputed if checkpointing is None else checkpointing
    before = [binding.enter(grid, replayable) for binding in bindings]
    try:
        with _remember(bindings, grid) if replayable else nullcontext():
            yield model
    finally:
        for binding, previous in zip(bindings, before, strict=True):
            binding.grid = previous


def _remember(bindings: list[Binding], grid: PatchGrid | None) -> torch.autograd.graph.saved_tensors_hooks:
    """Attach ``grid`` to every tensor saved for backward in the block.

    A checkpoint saves its inputs under these hooks, and unpacks them right before it recomputes. At that moment the
    modules must know the grid again. Tensors inside a checkpoint do not come through these hooks.
    """

    def pack(tensor: Tensor) -> Tensor:
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        for binding in bindings:
            binding.replay_with(grid)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
