"""Take up the state of a checkpoint: what does not fit this run is a sentence, whatever it would break later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.stream import BatchStream
from spatspark_fast.training.trainer import known_warnings_off

__all__ = ["check_state", "fit"]

NEEDED = ("batches_per_epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers")
# Where Lightning keeps the place of a run, beside ours: within the state of its loop.
STEPS = ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed")
BATCHES = ("state_dict", "combined_loader", 0, "position")
# What taking up a state that was edited can raise, before the first step.
BROKEN = (MisconfigurationException, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def check_state(state: dict[str, Any], plan: Plan, trainer: L.Trainer, checkpoint: Path | None) -> None:
    """Raise UserError unless all that says where a run stands agrees, and has the types that it has today."""
    if missing := [name for name in NEEDED if name not in state]:
        raise UserError(f"{checkpoint} lacks {missing[0]}: go on from a checkpoint that training has written whole")
    if len(state["optimizer_states"]) != 1:
        raise UserError(f"{checkpoint} has no state of one optimiser: go on from another checkpoint")
    fit_loop = state["loops"].get("fit_loop")
    fresh = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        fresh.setdefault("callbacks", {})[callback.state_key] = callback.state_dict()
    if (odd := _odd(state, fresh)) is not None:
        raise UserError(f"{checkpoint} was edited, or is of another version: {odd}; go on from another checkpoint")
    step, position = state["global_step"], state["position"]
    steps, batches = _at(fit_loop, STEPS, step), _at(fit_loop, BATCHES, position)
    if not plan.step_of(position) == steps == step or batches != position:
        raise UserError(
            f"{checkpoint} was edited: its {position} batches and {step} steps do not belong together; go on from "
            "another checkpoint"
        )


def fit(trainer: L.Trainer, module: L.LightningModule, stream: BatchStream, checkpoint: Path | None) -> None:
    """Train, from ``checkpoint`` if there is one; raise UserError if its state cannot be taken up."""
    watch = _TakenUp()
    if checkpoint is not None:
        trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
    try:
        with known_warnings_off():
            trainer.fit(module, stream, ckpt_path=checkpoint)
    except BROKEN as error:
        if checkpoint is None or watch.done or isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint} does not fit this run ({reason}); go on from another checkpoint") from error


class _TakenUp(L.Callback):
    """Look at the optimiser when all is loaded and nothing is done yet."""

    def __init__(self) -> None:
        self.done = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise ValueError unless the optimiser's state is one of these weights."""
        optimizer = trainer.optimizers[0]
        if trainer.global_step and not any(optimizer.state.values()):
            raise ValueError("of the optimiser all moments are missing")
        for group in optimizer.param_groups:
            if (odd := _odd(group, optimizer.defaults)) is not None:
                raise ValueError(f"of the optimiser {odd}")
            for parameter in group["params"]:
                _check_moments(optimizer.state.get(parameter, {}), group, tuple(parameter.shape))
        self.done = True


def _check_moments(state: Mapping[str, Any], group: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless what an optimiser knows of a weight is there, has its shape, and is finite."""
    for name in ("exp_avg", "exp_avg_sq"):
        value = state.get(name)
        if state and not (isinstance(value, Tensor) and value.shape == shape and bool(value.isfinite().all())):
            raise ValueError(f"the optimiser's {name} is not that of a weight of shape {shape}")
    step = state.get("step", group.get("step", 0 if not state else None))  # LAMB has one for all weights
    if not _counts(step, True):
        raise ValueError("the optimiser's step is no number")


def _odd(found: object, fresh: object, name: str = "") -> str | None:
    """Say where a state has another type than a fresh one; what only one of them has is left to its owner."""
    if isinstance(fresh, Mapping):
        if not isinstance(found, Mapping):
            return f"{name} is no group of entries"
        if not fresh and any(isinstance(value, str | bool | Mapping) for value in found.values()):
            return f"{name} holds what is no number"
        return next((odd for key in fresh if key in found and (odd := _odd(found[key], fresh[key], str(key)))), None)
    if isinstance(fresh, bool | str):
        return None if isinstance(found, type(fresh)) else f"{name} is no {type(fresh).__name__}"
    if isinstance(fresh, list | tuple):
        return None if isinstance(found, list | tuple) else f"{name} is no list"
    if isinstance(fresh, int | float) and not _counts(found, isinstance(fresh, int)):
        return f"{name} is no number"
    return None


def _counts(value: object, positive: bool) -> bool:
    """Tell whether a value is one number, perhaps a tensor, and at least 0 if asked."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, int | float) and not isinstance(value, bool) and (value >= 0 or not positive)


def _at(state: Any, places: tuple[str | int, ...], default: int) -> Any:
    """Return what lies below keys and numbers of a state; ``default`` where it has no such place."""
    try:
        for place in places:
            state = state[place]
    except (LookupError, TypeError):
        return default
    return state
