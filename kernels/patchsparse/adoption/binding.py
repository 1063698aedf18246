"""Which grid a sparsified model runs on: one :class:`Binding` per model, switched by :func:`bind`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..grid import PatchGrid
from ..ops.joined_norm import AllGather
from .bound import Bound, entered

__all__ = ["Binding", "bind", "bindings_of", "is_recomputed", "join_statistics"]

_RECOMPUTED = ("grad_checkpointing", "gradient_checkpointing")  # attributes of modules that recompute in backward


class Binding(Bound):
    """Hold the grid that the modules of one sparsified model run on; ``None`` means the plain dense model.

    Every Patch module of a model refers to the same Binding, as a plain attribute that is no part of the state dict.
    A deep copy or a pickle starts unbound, also inside a :func:`bind` block; a pickle also without ``all_gather``.

    Attributes:
        backend: name of the engine that the modules ask for.
        fuse: whether norms run as one operator with what follows them; None does it where it is faster.
        all_gather: joins the statistics of batch norms over processes, see :func:`join_statistics`; None does not.
    """

    def __init__(self, backend: str = "auto", fuse: bool | None = None):
        super().__init__()
        self.backend = backend
        self.fuse = fuse
        self.all_gather: AllGather | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        memo[id(self)] = copy = Binding(self.backend, self.fuse)
        copy.all_gather = self.all_gather
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Binding, (self.backend, self.fuse)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a pickle written before there was `__reduce__`
        self.__init__(state["backend"], state.get("fuse"))


def bindings_of(model: nn.Module) -> list[Binding]:
    """Return every distinct Binding in ``model``, in module order."""
    return _held_by(model)[0]


def is_recomputed(model: nn.Module) -> bool:
    """Return whether a module says that activation checkpointing recomputes parts of ``model``."""
    return _held_by(model)[1]


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
    sparsified parts. ``backward`` may come after the block, and from another thread. The block concerns the thread, or
    the task of asyncio, that enters it: others that run the model at the same time enter blocks of their own, and
    without one they run the dense model.

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
    with entered(_some_of(bindings, model), grid, recomputed if checkpointing is None else checkpointing):
        yield model
