"""Score forecasts side by side: `evaluate_forecaster` for one model, `evaluate_predictors` for several."""

from spatspark_fast.evaluate.scoring import Evaluation, ScoringOptions, evaluate_forecaster, evaluate_predictors

__all__ = ["Evaluation", "ScoringOptions", "evaluate_forecaster", "evaluate_predictors"]
