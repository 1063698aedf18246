"""Scores of rain forecasts, as torchmetrics states: errors, contingency tables, FSS and power spectra."""

from spatspark_fast.scores.defaults import FSS_SCALES, THRESHOLDS
from spatspark_fast.scores.formulas import CATEGORICAL_SCORES, Counts, categorical_scores
from spatspark_fast.scores.fractions import FractionsSkill, fractions_skill
from spatspark_fast.scores.nowcast import NowcastScores
from spatspark_fast.scores.spectrum import SMALL_SCALE, SpectralPower, radial_power
from spatspark_fast.scores.states import ContingencyTable, RainErrors, rain_errors

__all__ = [
    "CATEGORICAL_SCORES",
    "FSS_SCALES",
    "SMALL_SCALE",
    "THRESHOLDS",
    "ContingencyTable",
    "Counts",
    "FractionsSkill",
    "NowcastScores",
    "RainErrors",
    "SpectralPower",
    "categorical_scores",
    "fractions_skill",
    "radial_power",
    "rain_errors",
]
