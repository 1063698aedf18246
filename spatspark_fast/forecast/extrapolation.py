"""Move the newest rain along its motion, by pysteps (extra ``radar``): the baseline to beat for an hour.

Motion by Lucas and Kanade's method on the newest frames in dB, then semi-Lagrangian advection, as in pysteps'
own examples. Growth and decay are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError

__all__ = ["ExtrapolationPredictor"]

_DRY_DB = -15.0  # dB of no rain, as in pysteps: well below the -10 dB of the smallest rate that counts as wet


class ExtrapolationPredictor:
    """Advect the newest frame; NaN where the rain would come from outside the image.

    Raises:
        UserError: pysteps, or OpenCV, which finds the motion, cannot be imported.
    """

    in_length = 3
    max_steps: int | None = None

    def __init__(self, name: str = "extrapolation") -> None:
        self.name = name
        try:
            importlib.import_module("cv2")
            self._transform = _import("pysteps.utils.transformation").dB_transform
            self._motion = _import("pysteps.motion").get_method("LK")
            self._advect = _import("pysteps.nowcasts").get_method("extrapolation")
        except ImportError as error:
            raise UserError(
                f"the extrapolation baseline is pysteps' and cannot be imported ({error}); "
                'pip install "spatspark-fast[radar]", or leave it out of --baselines'
            ) from error

    def predict(self, rates: Tensor, steps: int) -> Tensor:
        """Map ``(B, 3, H, W)`` to ``(B, steps, H, W)``, both mm/h."""
        frames = rates.double().cpu().numpy()
        made = np.stack([self._extrapolate(window, steps) for window in frames])
        return torch.from_numpy(made).to(rates.device, rates.dtype)

    def _extrapolate(self, frames: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        newest = frames[-1]
        with _quiet():
            velocity = self._velocity(np.nan_to_num(frames, nan=0.0))
            if not np.any(velocity):  # nothing moves: pysteps' advection would only smooth it
                return np.repeat(newest[None], steps, axis=0)
            made = self._advect(newest, velocity, steps)
        # Linear interpolation may undershoot by rounding.
        return np.where(np.isnan(made), np.nan, np.maximum(made, 0.0))

    def _velocity(self, frames: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``(2, H, W)`` pixels per frame; 0 where no rain shows a motion."""
        if not (frames > units.MIN_WET_RATE).any():
            return np.zeros((2, *frames.shape[1:]))
        decibels, _ = self._transform(frames, threshold=units.MIN_WET_RATE, zerovalue=_DRY_DB)
        return np.asarray(self._motion(decibels))


def _import(name: str) -> Any:
    with _quiet():
        return importlib.import_module(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what pysteps prints and warns of out of our output."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
