"""Fractions skill score: is there as much rain in the neighbourhood, even if not on the same pixel?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from spatspark_fast.scores.states import check_pair, check_thresholds

__all__ = ["FractionsSkill", "RunningSums", "fractions_skill"]


class RunningSums:
    """Count events ``(..., H, W)`` bool in squares around each pixel, from one running sum for all sides.

    The cost of a side does not depend on it, and integers are exact. Nothing happens outside the image.
    """

    def __init__(self, events: Tensor, largest: int) -> None:
        self._size = tuple(events.shape[-2:])
        self._before = largest // 2
        after = largest - 1 - self._before
        # One more row and column in front, so that there is a sum of nothing.
        padded = F.pad(events.to(torch.int32), (self._before + 1, after, self._before + 1, after))
        self._sums = padded.cumsum(-2, dtype=torch.int32).cumsum(-1, dtype=torch.int32)

    def counts(self, side: int) -> Tensor:
        """Return the events in the square of ``side`` pixels around each pixel, ``(..., H, W)`` int32.

        Equivalent to ``scipy.ndimage.uniform_filter(events.astype(float), side, mode="constant") * side**2``.
        """
        height, width = self._size
        low = self._before - side // 2
        sums, high = self._sums, low + side
        top, bottom = sums[..., low : low + height, :], sums[..., high : high + height, :]
        rows = bottom - top
        return rows[..., high : high + width] - rows[..., low : low + width]


class FractionsSkill(Metric):
    """Accumulate what the fractions skill score (Roberts and Lean, 2008) needs.

    It does so for every lead time, threshold in mm/h and scale in pixels.
    ``compute`` returns ``(L, K, S, 2)`` float64: sums of squared differences of the fractions, and of the squares
    of both. A pixel without data is dry in forecast and observation alike.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, lead_times: int, thresholds: Sequence[float], scales: Sequence[int]) -> None:
        super().__init__()
        if any(scale < 1 or int(scale) != scale for scale in scales):
            raise ValueError(f"scales {list(scales)} must be whole numbers of pixels of at least 1")
        self.lead_times = lead_times
        self.thresholds = check_thresholds(thresholds)
        self.scales = tuple(sorted({int(scale) for scale in scales}))
        zero = torch.zeros(lead_times, len(self.thresholds), len(self.scales), 2, dtype=torch.float64)
        self.add_state("sums", default=zero, dist_reduce_fx="sum")

    def update(self, forecast: Tensor, observed: Tensor) -> None:
        """Add ``(B, L, H, W)`` mm/h; see `check_pair` for errors."""
        valid = check_pair(forecast, observed, self.lead_times)
        # One window at a time: the intermediate counts of a batch would be its size several times over.
        for window in range(len(forecast)):
            for k, threshold in enumerate(self.thresholds):
                ours = (forecast[window] > threshold) & valid[window]
                theirs = (observed[window] > threshold) & valid[window]
                self.sums[:, k] += _terms(ours, theirs, self.scales)

    def compute(self) -> Tensor:
        """Return the sums so far."""
        return self.sums


def _terms(forecast: Tensor, observed: Tensor, scales: Sequence[int]) -> Tensor:
    """Return ``(L, S, 2)`` float64 for events ``(L, H, W)``."""
    ours, theirs = RunningSums(forecast, max(scales)), RunningSums(observed, max(scales))

    def energy(counts: Tensor, scale: int) -> Tensor:
        fractions = counts.to(torch.float32) / scale**2
        return fractions.square_().sum((1, 2), dtype=torch.float64)

    terms = []
    for scale in scales:
        a, b = ours.counts(scale), theirs.counts(scale)
        terms.append(torch.stack([energy(a - b, scale), energy(a, scale) + energy(b, scale)], dim=1))
    return torch.stack(terms, dim=1)


def fractions_skill(sums: Tensor) -> Tensor:
    """Turn sums ``(..., 2)`` into the score: 1 = perfect, 0 = no overlap at this scale, NaN = nothing happened."""
    differences, squares = sums.unbind(-1)
    return torch.where(squares == 0, torch.nan, 1.0 - differences / squares.where(squares != 0, 1.0))
