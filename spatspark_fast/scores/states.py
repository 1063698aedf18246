"""Accumulate counts and sums over batches as torchmetrics states: contingency tables and squared errors.

All take a forecast and an observation of shape ``(B, L, H, W)``: B windows, L lead times, rain in mm/h, NaN
where there is no data. A pixel counts only where both are finite. States are sums, so that batches, processes
and devices add up to what all at once would give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from spatspark_fast.common import units
from spatspark_fast.scores.formulas import Counts, ratio

__all__ = ["ContingencyTable", "RainErrors", "check_pair", "check_thresholds", "rain_errors"]


def check_pair(forecast: Tensor, observed: Tensor, lead_times: int) -> Tensor:
    """Return ``(B, L, H, W)`` bool, True where both are finite.

    Raises:
        ValueError: the shapes differ, are not ``(B, L, H, W)``, or hold another number of lead times.
    """
    if forecast.shape != observed.shape or forecast.ndim != 4 or forecast.shape[1] != lead_times:
        raise ValueError(
            f"forecast {tuple(forecast.shape)} and observed {tuple(observed.shape)} must both have the shape "
            f"(windows, {lead_times} lead times, height, width)"
        )
    return torch.isfinite(forecast) & torch.isfinite(observed)


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return the thresholds in mm/h in ascending order.

    Raises:
        ValueError: there is none, one is not a finite number of at least 0, or one comes twice.
    """
    values = tuple(sorted(float(threshold) for threshold in thresholds))
    if not values or not all(0 <= value < float("inf") for value in values) or len(set(values)) < len(values):
        raise ValueError(f"thresholds {list(thresholds)} must be different rain rates in mm/h of at least 0")
    return values


class ContingencyTable(Metric):
    """Count hits, misses, false alarms and correct negatives for every lead time and threshold.

    A pixel is wet *above* a threshold (mm/h). ``compute`` returns `Counts` of int64 tensors ``(L, K)``. The state
    is the joint histogram of the classes between the thresholds, from which every table follows: one pass over
    the pixels, however many thresholds.
    """

    full_state_update = False
    table: Tensor

    def __init__(self, lead_times: int, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.lead_times = lead_times
        self.thresholds = check_thresholds(thresholds)
        classes = len(self.thresholds) + 1
        zero = torch.zeros(lead_times, classes, classes, dtype=torch.int64)
        self.add_state("table", default=zero, dist_reduce_fx="sum")

    def update(self, forecast: Tensor, observed: Tensor) -> None:
        """Add ``(B, L, H, W)`` mm/h; see `check_pair` for errors."""
        valid = check_pair(forecast, observed, self.lead_times)
        bounds = torch.tensor(self.thresholds, device=forecast.device, dtype=forecast.dtype)
        classes = len(self.thresholds) + 1
        lead = torch.arange(self.lead_times, device=forecast.device, dtype=torch.int32)[:, None, None]
        index = torch.bucketize(forecast.contiguous(), bounds, out_int32=True)
        index = (lead * classes + index) * classes
        index = index + torch.bucketize(observed.contiguous(), bounds.to(observed.dtype), out_int32=True)
        self.table += torch.bincount(index[valid], minlength=self.table.numel()).view_as(self.table)

    def compute(self) -> Counts:
        """Return the counts so far."""
        # above[l, i, j]: pixels above the thresholds before i in the forecast, before j in the observation.
        above = self.table.flip((1, 2)).cumsum(1).cumsum(2).flip((1, 2))
        total = above[:, 0, 0, None]
        hits = above.diagonal(dim1=1, dim2=2)[:, 1:]
        forecast, observed = above[:, 1:, 0], above[:, 0, 1:]
        return Counts(hits, observed - hits, forecast - hits, total - forecast - observed + hits)


class RainErrors(Metric):
    """Accumulate squared, absolute and plain errors for every lead time.

    ``compute`` returns a tensor ``(L, 4)`` float64 of sums: squared errors (mm/h)^2, absolute errors and errors
    mm/h, pixels. `rain_errors` turns sums into scores.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, lead_times: int) -> None:
        super().__init__()
        self.lead_times = lead_times
        zero = torch.zeros(lead_times, 4, dtype=torch.float64)
        self.add_state("sums", default=zero, dist_reduce_fx="sum")

    def update(self, forecast: Tensor, observed: Tensor) -> None:
        """Add ``(B, L, H, W)`` mm/h; see `check_pair` for errors."""
        valid = check_pair(forecast, observed, self.lead_times)
        error = torch.where(valid, forecast - observed, torch.zeros((), device=forecast.device))
        axes, double = (0, 2, 3), torch.float64
        terms = (error.square(), error.abs(), error, valid)
        self.sums += torch.stack([term.sum(axes, dtype=double) for term in terms], dim=1)

    def compute(self) -> Tensor:
        """Return the sums so far."""
        return self.sums


def rain_errors(sums: Tensor, scale: float) -> dict[str, Tensor]:
    """Turn sums ``(..., 4)`` of `RainErrors` into errors with units.

    They are ``mse`` (of values / ``scale``, mm per 5 min), ``pmse`` in (mm/5min)^2, ``mae`` and ``mean_error`` in mm/h.
    """
    squares, absolutes, errors, pixels = sums.unbind(-1)
    # Errors are rates; squared depths are smaller by the square of the conversion.
    pmse = ratio(squares, pixels) * units.mm_per_hour_to_mm_per_5min(1.0) ** 2
    return {
        "mse": pmse / scale**2,
        "pmse": pmse,
        "mae": ratio(absolutes, pixels),
        "mean_error": ratio(errors, pixels),
    }
