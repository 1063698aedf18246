"""One function that forecasts, called as pysteps' methods are: rates in mm/h in, rates in mm/h out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from spatspark_fast.common.errors import UserError
from spatspark_fast.forecast.predictors import ModelPredictor, choose_device, load_predictor
from spatspark_fast.forecast.tiling import check_tile
from spatspark_fast.models.forecaster import LONGEST
from spatspark_fast.models.registry import LoadedForecaster

__all__ = ["nowcast", "pysteps_method"]

MOST_RAIN = 1e6  # mm/h; the wettest pixel of a hailstorm is far below
LEGIBLE = 80  # letters of a value in a message

Model = str | Path | LoadedForecaster | ModelPredictor


class _Method(Protocol):
    def __call__(
        self, precip: ArrayLike, velocity: object, timesteps: int | Sequence[float], **keywords: Any
    ) -> NDArray[np.floating]: ...


def nowcast(
    frames: ArrayLike,
    timesteps: int | Sequence[float],
    model: Model,
    *,
    tile: int | None = None,
    device: str | None = None,
) -> NDArray[np.floating]:
    """Forecast rain rates ``(num_timesteps, H, W)`` in mm/h from ``frames`` ``(T, H, W)`` in mm/h.

    Args:
        frames: rates of at least as many frames as the model reads, one every 5 minutes, the newest last; NaN or
            masked = no data. Images of any size: they are padded.
        timesteps: number of steps of 5 minutes, or ascending steps such as [0.5, 1, 3], between which rates are
            interpolated linearly, as pysteps has it. Beyond the steps that the model was trained for it goes on
            from its own forecast, for two weeks (4096 steps) at most.
        model: checkpoint of `finetune`, or one that is loaded, which saves time when many forecasts are made.
        tile: side in pixels of overlapping tiles, for images too large for memory.
        device: where the model of a checkpoint runs (default: the CPU); a loaded one runs where it is.

    Returns:
        float32, or float64 if the frames are; NaN where none of the frames that the model reads has data.

    Raises:
        UserError: (a ValueError) too few frames, rates that are negative, infinite or beyond any rain, wrong steps,
            or a device beside a model that is loaded.
        TypeError: the model is none.
    """
    predictor = _predictor(model, tile, device)
    rates = _checked(frames, predictor.in_length)
    steps = _checked_steps(timesteps)
    last = int(np.ceil(steps[-1]))
    past = torch.from_numpy(rates[-predictor.in_length :].astype(np.float32))
    made = predictor.predict(past[None], last)[0].numpy()
    made[:, np.isnan(rates[-predictor.in_length :]).all(axis=0)] = np.nan
    return _interpolated(rates[-1], made, steps).astype(rates.dtype)


def pysteps_method(model: Model, **options: Any) -> _Method:
    """Return a function that is called like those of ``pysteps.nowcasts.get_method``.

    ``method(precip, velocity, timesteps)`` takes rates in mm/h, not in dB, and as many frames as the model reads;
    the velocity plays no part. ``options`` are ``tile`` and ``device`` of `nowcast`. A checkpoint is loaded once.

    Raises:
        UserError: (a ValueError) the checkpoint cannot be read, or the device cannot be used.
        TypeError: an option or a model that is none.
    """
    if unknown := sorted(set(options) - {"tile", "device"}):
        raise TypeError(f"{unknown[0]} is no option of nowcast: give tile or device")
    loaded = _predictor(model, options.get("tile"), options.get("device"))

    def forecast(
        precip: ArrayLike, velocity: object, timesteps: int | Sequence[float], **keywords: Any
    ) -> NDArray[np.floating]:
        """Forecast ``(num_timesteps, H, W)`` mm/h from ``precip`` ``(T, H, W)`` mm/h; see `nowcast`."""
        del velocity
        return nowcast(precip, timesteps, loaded, **keywords)

    return forecast


def _predictor(model: Model, tile: int | None, device: str | None) -> ModelPredictor:
    """Load a checkpoint, or take what is loaded; ``tile`` wins over the predictor's own."""
    if isinstance(model, str | Path):
        predictor = load_predictor(model, choose_device("cpu" if device is None else device))
    elif isinstance(model, ModelPredictor):
        predictor = ModelPredictor(model.loaded, model.name, model.tile)
    elif isinstance(model, LoadedForecaster):
        predictor = ModelPredictor(model)
    else:
        raise TypeError(
            f"model is a {type(model).__name__}: give the path of a checkpoint, or what load_forecaster returns"
        )
    if device is not None and not isinstance(model, str | Path):
        raise UserError(f"device is {device}, but the model is loaded: give the device to load_forecaster")
    if tile is not None:
        check_tile(tile, predictor.loaded.multiple)
        predictor.tile = tile
    return predictor


def _checked(frames: ArrayLike, needed: int) -> NDArray[np.floating]:
    try:
        array = np.ma.asarray(frames)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"they are {array.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"frames are no array of numbers (T, H, W) in mm/h: {error}") from error
    kind = np.float64 if array.dtype == np.float64 else np.float32
    rates = np.ma.filled(array.astype(kind), np.nan)
    if rates.ndim != 3 or rates.shape[0] < needed or 0 in rates.shape:
        raise UserError(
            f"frames {rates.shape} must have the shape (T, H, W) with T of at least {needed} for this model"
        )
    if np.isinf(rates).any():
        raise UserError("frames hold infinite values; they must be rates in mm/h, NaN where there is no data")
    if (rates < 0).any():
        raise UserError(
            f"frames hold negative values, the least {np.nanmin(rates):g}; they must be rates in mm/h, not in dB"
        )
    if (rates > MOST_RAIN).any():
        raise UserError(
            f"frames hold {np.nanmax(rates):g}, which is beyond any rain; they must be rates in mm/h, NaN where there "
            "is no data"
        )
    return rates


def _checked_steps(timesteps: int | Sequence[float]) -> NDArray[np.float64]:
    wrong = (
        f"timesteps {_shortly(timesteps)} must be a whole number of at least 1, or positive steps in ascending order"
    )
    try:
        given = np.asarray(timesteps)
        if given.dtype.kind not in "fiu" or (given.ndim == 0 and given.dtype.kind == "f"):
            raise UserError(wrong)
        last = float(given if given.ndim == 0 else given.max())
    except (TypeError, ValueError) as error:  # of ragged lists, empty ones and the like
        raise UserError(wrong) from error
    if last > LONGEST:
        raise UserError(
            f"timesteps {_shortly(timesteps)} go {last:g} steps of 5 minutes ahead: give at most {LONGEST}, two weeks"
        )
    steps = np.arange(1, last + 1) if given.ndim == 0 else given.astype(np.float64)
    ascending = steps.ndim == 1 and len(steps) > 0 and bool(np.isfinite(steps).all() and (np.diff(steps) > 0).all())
    if not ascending or steps[0] <= 0:
        raise UserError(wrong)
    return steps


def _shortly(value: object) -> str:
    words = repr(value)
    return words if len(words) <= LEGIBLE else f"{words[:LEGIBLE]}..."


def _interpolated(
    newest: NDArray[np.floating], made: NDArray[np.floating], steps: NDArray[np.float64]
) -> NDArray[np.floating]:
    """Interpolate between the newest frame (step 0) and the forecasts (steps 1, 2, ...)."""
    # Where the newest frame has no data but the model says something, that holds from the start.
    whole = np.concatenate((np.where(np.isnan(newest), made[0], newest)[None], made))
    below = np.floor(steps).astype(int)
    above = np.ceil(steps).astype(int)
    share = (steps - below)[:, None, None]
    return np.where(share == 0, whole[below], (1 - share) * whole[below] + share * whole[above])
