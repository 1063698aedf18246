"""Forecasts in mm/h from frames in mm/h, whatever makes them: a model, persistence, or optical flow.

NaN is no data on both sides: in frames a pixel that no radar saw, in a forecast one of which the method says
nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.forecast.tiling import predict_tiled
from spatspark_fast.models.registry import LoadedForecaster, load_forecaster

__all__ = ["ModelPredictor", "PersistencePredictor", "Predictor", "choose_device", "load_predictor", "split_name"]


class Predictor(Protocol):
    """Forecast rain; see `ModelPredictor` for what is expected."""

    name: str

    @property
    def in_length(self) -> int:
        """Number of frames that `predict` needs."""
        ...

    @property
    def max_steps(self) -> int | None:
        """Largest number of steps that the method was made for; None = any."""
        ...

    def predict(self, rates: Tensor, steps: int) -> Tensor:
        """Map ``rates`` ``(B, in_length, H, W)`` to ``(B, steps, H, W)``, both mm/h, NaN = no data."""
        ...


class ModelPredictor:
    """Forecast with a trained model: ``(B, in_length, H, W)`` mm/h to ``(B, steps, H, W)`` mm/h, any H and W.

    Pixels without data are dry to the model, as in training; its forecast has a value everywhere, at least 0.
    More steps than the model was trained for are forecast from its own forecast.

    Args:
        loaded: model and scale, see `spatspark_fast.models.registry.load_forecaster`.
        name: instead of the model's own.
        tile: side in pixels of the tiles in which larger images are forecast; None takes the whole image.
    """

    def __init__(self, loaded: LoadedForecaster, name: str | None = None, tile: int | None = None) -> None:
        self.loaded = loaded
        self.name = loaded.name if name is None else name
        self.tile = tile

    @property
    def in_length(self) -> int:
        """Number of frames that the model reads."""
        return self.loaded.in_length

    @property
    def max_steps(self) -> int | None:
        """Number of frames that the model was trained to forecast."""
        return self.loaded.out_length

    @torch.no_grad()
    def predict(self, rates: Tensor, steps: int) -> Tensor:
        """Return a forecast on the device of ``rates``.

        Raises:
            UserError: the model forecasts values that are not finite, or there are fewer frames than it reads.
        """
        model, scale = self.loaded.model, self.loaded.scale
        if rates.ndim != 4 or rates.shape[1] != self.in_length:
            raise UserError(f"{self.name} needs frames (B, {self.in_length}, H, W), got {tuple(rates.shape)}")
        first = next(model.parameters(), rates)  # persistence has no parameters
        frames = units.normalised(rates.to(first.device, torch.float32), scale).nan_to_num(nan=0.0)
        made: list[Tensor] = []
        while sum(part.shape[1] for part in made) < steps:
            forecast = predict_tiled(model, frames, self.tile)
            made.append(forecast)
            frames = torch.cat((frames, forecast), dim=1)[:, -self.in_length :]
        forecast = units.mm_per_hour(torch.cat(made, dim=1)[:, :steps], scale)
        if not bool(torch.isfinite(forecast).all()):
            raise UserError(f"{self.name} forecasts values that are not finite: its training has failed")
        return forecast.to(rates.device)


class PersistencePredictor:
    """Repeat the newest frame; NaN where that has no data."""

    in_length = 1
    max_steps: int | None = None

    def __init__(self, name: str = "persistence") -> None:
        self.name = name

    def predict(self, rates: Tensor, steps: int) -> Tensor:
        """Map ``(B, T, H, W)`` to ``(B, steps, H, W)``, both mm/h."""
        return rates[:, -1:].expand(-1, steps, -1, -1)


def load_predictor(
    checkpoint: str | Path, device: str = "cpu", name: str | None = None, tile: int | None = None
) -> ModelPredictor:
    """Load a checkpoint of `finetune`; raise UserError for whatever else the file is."""
    return ModelPredictor(load_forecaster(checkpoint, device), name, tile)


def split_name(word: str) -> tuple[str | None, Path]:
    """Split ``NAME=FILE`` of ``--checkpoint``; a file that exists under the whole word has no name."""
    name, equals, path = word.partition("=")
    return (name, Path(path)) if equals and name and not Path(word).exists() else (None, Path(word))


def choose_device(asked: str) -> str:
    """Return the device for "auto", "cpu", "cuda" or "cuda:1"; raise UserError for one that is not there."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {asked} cannot be used ({reason}); give auto, cpu or cuda") from error
    return asked
