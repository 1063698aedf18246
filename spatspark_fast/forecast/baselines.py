"""Forecasts that need no training, to compare models with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from spatspark_fast.forecast.predictors import Predictor

__all__ = ["BASELINES_HELP", "Baseline", "load_baselines"]

Baseline = Literal["persistence", "extrapolation"]

BASELINES_HELP = (
    "forecasts to compare with: persistence (the newest frame again), extrapolation (optical flow by pysteps)"
)


def load_baselines(names: Iterable[Baseline]) -> list[Predictor]:
    """Return a predictor for each of the names, each once; raise `UserError` where pysteps is needed and missing."""
    from spatspark_fast.forecast.extrapolation import ExtrapolationPredictor  # torch takes seconds
    from spatspark_fast.forecast.predictors import PersistencePredictor

    kinds = {"persistence": PersistencePredictor, "extrapolation": ExtrapolationPredictor}
    return [kinds[name]() for name in dict.fromkeys(names)]
