"""What every model that forecasts has in common, and how one comes out of a checkpoint.

A forecaster maps frames ``(B, in_length, H, W)`` to frames ``(B, out_length, H, W)``, one frame for every 5
minutes, both in data units: mm per 5 min divided by the scale of the data set. It runs on ordinary dense layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import load_plain

__all__ = [
    "Forecaster",
    "LoadedForecaster",
    "Persistence",
    "build_forecaster",
    "check_lengths",
    "describe_forecaster",
    "forecaster_weights",
    "load_forecaster",
    "pad_to_multiple",
    "read_forecaster_checkpoint",
]

# Entry of a checkpoint that says how to build the model in it; see `describe_forecaster`.
DESCRIPTION = "forecaster"
PREFIX, AVERAGE_PREFIX = "model.", "ema.module."


def check_lengths(in_length: int, out_length: int) -> None:
    """Raise UserError unless both count at least one frame."""
    for name, value in (("in_length", in_length), ("out_length", out_length)):
        if value < 1:
            raise UserError(f"{name} counts frames of 5 minutes and must be at least 1, got {value}")


class Forecaster(nn.Module):
    """Forecast ``out_length`` frames from ``in_length`` frames, a frame being 5 minutes.

    ``multiple``: height and width (pixels) must be multiples of it for ``forward``; `predict` takes any size.
    """

    def __init__(self, in_length: int, out_length: int, multiple: int = 1) -> None:
        super().__init__()
        check_lengths(in_length, out_length)
        self.in_length = in_length
        self.out_length = out_length
        self.multiple = multiple

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``frames`` ``(B, in_length, H, W)`` to ``(B, out_length, H, W)``, both in data units.

        Values may be slightly negative: a loss needs their gradient. `predict` cuts them off.
        """
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, frames: Tensor) -> Tensor:
        """Return a forecast of at least 0, ``(B, out_length, H, W)``, for images of any size.

        Pads with dry pixels to a multiple of ``multiple`` and cuts the border off again. Runs in the mode the
        model is in: call ``eval()`` before.
        """
        height, width = frames.shape[-2:]
        return self(pad_to_multiple(frames, self.multiple)).clamp(min=0)[..., :height, :width]

    def check(self, frames: Tensor) -> None:
        """Raise UserError unless ``frames`` fit the model; says nothing while a graph is traced."""
        if torch.compiler.is_compiling():
            return
        if frames.ndim != 4 or frames.shape[1] != self.in_length:
            need = f"(B, {self.in_length}, H, W)"
            raise UserError(f"frames must be {need} for this model, got {tuple(frames.shape)}")
        if frames.shape[2] % self.multiple or frames.shape[3] % self.multiple:
            raise UserError(
                f"height and width must be multiples of {self.multiple} for this model, got "
                f"{frames.shape[2]} x {frames.shape[3]}: use predict(), or pad_to_multiple()"
            )


class Persistence(Forecaster):
    """Repeat the last frame: the forecast that every other one has to beat."""

    def __init__(self, in_length: int = 12, out_length: int = 12) -> None:
        super().__init__(in_length, out_length)

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``(B, in_length, H, W)`` to ``(B, out_length, H, W)``."""
        self.check(frames)
        return frames[:, -1:].repeat(1, self.out_length, 1, 1)


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


def pad_to_multiple(frames: Tensor, multiple: int) -> Tensor:
    """Pad ``(..., H, W)`` at the bottom and the right with zeros (dry) to multiples of ``multiple``."""
    below, right = (-side % multiple for side in frames.shape[-2:])
    return F.pad(frames, (0, right, 0, below)) if below or right else frames


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

    Raises UserError for a kind or an option that does not exist.
    """
    # They derive from the class above.
    from spatspark_fast.models.smaat import SmaAtUNet
    from spatspark_fast.models.spatspark import build_spatspark

    builders = {"spatspark": build_spatspark, "smaat": SmaAtUNet, "persistence": Persistence}
    if kind not in builders:
        raise UserError(f"unknown kind of model {kind!r}; there are {', '.join(builders)}")
    try:
        return builders[kind](in_length=in_length, out_length=out_length, **options)
    except TypeError as error:
        raise UserError(f"a model of kind {kind!r} cannot be built: {error}") from error


def read_forecaster_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of `finetune` onto the CPU, plain values and tensors only.

    Raises UserError if the file is missing, damaged, or holds no forecaster.
    """
    checkpoint = load_plain(Path(path), "finetune")
    if isinstance(checkpoint, dict) and {DESCRIPTION, "state_dict"} <= set(checkpoint):
        return checkpoint
    if isinstance(checkpoint, dict) and "mask" in (checkpoint.get("config") or {}):
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
    about = checkpoint[DESCRIPTION]
    try:
        model = build_forecaster(about["kind"], about["in_length"], about["out_length"], about["options"])
        model.load_state_dict(forecaster_weights(checkpoint))
        scale, name = float(about["scale"]), str(about["name"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} describes a model that its weights do not fit: {error}") from error
    model.to(device).eval()
    return LoadedForecaster(model, name, model.in_length, model.out_length, scale, model.multiple)
