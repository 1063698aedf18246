"""A forecast with its times and its place, and how one is made of a `Start`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch
from numpy.typing import NDArray

from spatspark_fast.forecast.predictors import Predictor
from spatspark_fast.forecast.starts import Start

__all__ = ["Forecast", "make_forecast"]


@dataclass(frozen=True)
class Forecast:
    """Hold ``rates`` ``(L, H, W)`` float32 mm/h, NaN where no radar ever saw, and what they start from."""

    rates: NDArray[np.float32]
    start: Start
    model: str

    @property
    def lead_minutes(self) -> list[float]:
        """Lead times in minutes after the end of the newest frame."""
        step = self.start.interval.total_seconds() / 60
        return [step * (lead + 1) for lead in range(len(self.rates))]

    @property
    def valid_times(self) -> list[datetime] | None:
        """Ends of the forecast frames, naive UTC; None where the times of the input are not known."""
        if self.start.times is None:
            return None
        return [self.start.times[-1] + self.start.interval * (lead + 1) for lead in range(len(self.rates))]


def make_forecast(predictor: Predictor, start: Start, steps: int) -> Forecast:
    """Forecast ``steps`` frames; NaN where none of the frames that the model reads has data."""
    frames = torch.from_numpy(start.rates)[None, -predictor.in_length :]
    rates = predictor.predict(frames, steps)[0]
    unseen = torch.isnan(frames[0]).all(0)
    return Forecast(rates.masked_fill(unseen, torch.nan).numpy(), start, predictor.name)
