"""Build a forecaster by its kind, and load one from a checkpoint of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import load_plain
from spatspark_fast.common.options import check_types
from spatspark_fast.common.units import check_scale
from spatspark_fast.models.forecaster import Forecaster, Persistence
from spatspark_fast.models.smaat import SmaAtUNet
from spatspark_fast.models.spatspark import build_spatspark
from spatspark_fast.models.weights import check_weights

__all__ = [
    "LoadedForecaster",
    "build_forecaster",
    "describe_forecaster",
    "forecaster_weights",
    "load_forecaster",
    "read_forecaster_checkpoint",
]

# Entry of a checkpoint that says how to build the model in it; see `describe_forecaster`.
DESCRIPTION = "forecaster"
DESCRIBED = {"name": str, "kind": str, "in_length": int, "out_length": int, "scale": float, "options": dict}
PREFIX, AVERAGE_PREFIX = "model.", "ema.module."


@dataclass
class LoadedForecaster:
    """Hold a model and what its checkpoint says of it.

    ``scale`` is the rain, in mm per 5 min, of data value 1. ``model`` is in evaluation mode.
    """

    model: Forecaster
    name: str
    in_length: int
    out_length: int
    scale: float
    multiple: int


def describe_forecaster(
    name: str, kind: str, in_length: int, out_length: int, scale: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the plain values that a checkpoint keeps under ``"forecaster"``, from which it is built again."""
    return {
        "name": name,
        "kind": kind,
        "in_length": in_length,
        "out_length": out_length,
        "scale": scale,
        "options": dict(options),
    }


def build_forecaster(kind: str, in_length: int, out_length: int, options: Mapping[str, Any]) -> Forecaster:
    """Build a model of a kind: ``spatspark``, ``smaat`` or ``persistence``, with options of its constructor.

    Raises UserError for a kind or an option that does not exist, or has another type.
    """
    builders = {"spatspark": build_spatspark, "smaat": SmaAtUNet, "persistence": Persistence}
    if kind not in builders:
        raise UserError(f"unknown kind of model {kind!r}; there are {', '.join(builders)}")
    builder = builders[kind]
    hints = get_type_hints(builder.__init__ if isinstance(builder, type) else builder)
    del hints["return"]
    lengths = {"in_length": in_length, "out_length": out_length}
    try:
        return builder(**check_types({**options, **lengths}, hints))
    except UserError as error:
        raise UserError(f"a model of kind {kind!r} cannot be built: {error}") from error


def read_forecaster_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of `finetune` onto the CPU, plain values and tensors only.

    Raises UserError if the file is missing, damaged, or holds no forecaster.
    """
    checkpoint = load_plain(Path(path), "finetune")
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if isinstance(checkpoint, dict) and {DESCRIPTION, "state_dict"} <= set(checkpoint):
        return checkpoint | {"state_dict": check_weights(checkpoint["state_dict"], path)}
    if isinstance(config, dict) and "mask" in config:
        raise UserError(
            f"{path} is a checkpoint of pretrain, which cannot forecast yet: "
            f"python -m spatspark_fast.finetune --init {path} makes one that can"
        )
    raise UserError(f"{path} is no checkpoint of finetune: it does not describe a forecaster")


def forecaster_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the model in a checkpoint of `finetune`: their average, where there is one."""
    state: dict[str, Tensor] = checkpoint["state_dict"]
    prefix = AVERAGE_PREFIX if any(key.startswith(AVERAGE_PREFIX) for key in state) else PREFIX
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_forecaster(path: str | Path, device: str | torch.device = "cpu") -> LoadedForecaster:
    """Load the model of a checkpoint of `finetune`, ready to forecast.

    Raises UserError naming the file if it is missing, damaged, a pretraining checkpoint or any other file.
    """
    checkpoint = read_forecaster_checkpoint(path)
    weights = forecaster_weights(checkpoint)
    try:
        about = check_types(checkpoint[DESCRIPTION], DESCRIBED)
        build = about["kind"], about["in_length"], about["out_length"], about["options"]
        scale, name = check_scale(about["scale"]), about["name"]
        with torch.device("meta"):  # an absurd width takes no memory there
            _check_fit(build_forecaster(*build).state_dict(), weights)
        model = build_forecaster(*build)
        model.load_state_dict(weights)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that its weights do not fit: {error}") from error
    model.to(device).eval()
    return LoadedForecaster(model, name, model.in_length, model.out_length, scale, model.multiple)


def _check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first weight that a model lacks, or has in another shape."""
    for name in (*own, *weights):
        needed, found = (tuple(state[name].shape) if name in state else "none" for state in (own, weights))
        if needed != found:
            raise UserError(f"of {name} it needs {needed}, there is {found}")
