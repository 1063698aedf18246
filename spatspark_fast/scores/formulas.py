"""Turn the counts of contingency tables into scores; what is undefined (0/0) is NaN, never 0."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CATEGORICAL_SCORES", "Counts", "categorical_scores", "ratio"]

CATEGORICAL_SCORES: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "share of all pixels that are right",
        "precision": "share of the pixels forecast wet that were wet",
        "recall": "share of the wet pixels that were forecast wet (probability of detection)",
        "f1": "harmonic mean of precision and recall",
        "csi": "critical success index: hits among all pixels forecast or observed wet",
        "far": "false alarm ratio, 1 - precision",
        "hss": "Heidke skill score: accuracy above that of chance; 0 = chance, 1 = perfect",
        "bias": "pixels forecast wet for each wet pixel; 1 = as many",
    }
)
"""Names and meanings of the scores of a contingency table, in the order of the tables."""


class Counts(NamedTuple):
    """Hold the four counts of contingency tables, tensors of one shape."""

    hits: Tensor
    misses: Tensor
    false_alarms: Tensor
    correct_negatives: Tensor


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide in float64; NaN where ``whole`` is 0."""
    part, whole = part.double(), whole.double()
    return torch.where(whole == 0, torch.nan, part / whole.where(whole != 0, torch.ones_like(whole)))


def categorical_scores(counts: Counts) -> dict[str, Tensor]:
    """Return the scores named in ``CATEGORICAL_SCORES``, float64, of the shape of the counts.

    Equivalent to ``pysteps.verification.detcatscores.det_cat_fct`` for ACC, POD (recall), FAR, F1, CSI, HSS and
    BIAS, but for the type: pysteps divides integers.
    """
    hits, misses, false_alarms, negatives = (count.double() for count in counts)
    forecast, observed = hits + false_alarms, hits + misses
    total = forecast + misses + negatives
    chance = observed * (misses + negatives) + forecast * (false_alarms + negatives)
    return {
        "accuracy": ratio(hits + negatives, total),
        "precision": ratio(hits, forecast),
        "recall": ratio(hits, observed),
        "f1": ratio(2 * hits, forecast + observed),
        "csi": ratio(hits, forecast + misses),
        "far": ratio(false_alarms, forecast),
        "hss": ratio(2 * (hits * negatives - misses * false_alarms), chance),
        "bias": ratio(forecast, observed),
    }
