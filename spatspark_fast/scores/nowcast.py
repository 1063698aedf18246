"""All scores of a nowcast in one object: accumulate windows, then read a plain dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatspark_fast.common import units
from spatspark_fast.scores.defaults import FSS_SCALES, THRESHOLDS
from spatspark_fast.scores.formulas import Counts, categorical_scores, ratio
from spatspark_fast.scores.fractions import FractionsSkill, fractions_skill
from spatspark_fast.scores.spectrum import SpectralPower
from spatspark_fast.scores.states import ContingencyTable, RainErrors, check_pair, rain_errors

__all__ = ["NowcastScores"]


class NowcastScores(nn.Module):
    """Score forecasts ``(B, L, H, W)`` against observations of the same shape, rain in mm/h, NaN = no data.

    Args:
        lead_times: L.
        size: H and W in pixels.
        thresholds: rates in mm/h; a pixel is wet above one.
        fss_scales: sides in pixels of the neighbourhoods of the fractions skill score; none leaves it out.
        spectrum: compute power spectra.
        scale: depth in mm per 5 min by which ``mse`` is normalised.
        interval_minutes: time between two frames.
    """

    def __init__(
        self,
        lead_times: int,
        size: tuple[int, int],
        thresholds: Sequence[float] = THRESHOLDS,
        fss_scales: Sequence[int] = FSS_SCALES,
        spectrum: bool = True,
        scale: float = units.NL50_SCALE,
        interval_minutes: float = units.FRAME_MINUTES,
    ) -> None:
        super().__init__()
        self.lead_times = lead_times
        self.scale = scale
        self.interval_minutes = interval_minutes
        self.windows = 0
        self.table = ContingencyTable(lead_times, thresholds)
        self.errors = RainErrors(lead_times)
        self.fractions = FractionsSkill(lead_times, thresholds, fss_scales) if fss_scales else None
        self.spectra = SpectralPower(lead_times, *size) if spectrum else None

    def update(self, forecast: Tensor, observed: Tensor) -> None:
        """Add windows.

        Raises:
            ValueError: the shapes differ or are not the expected ones.
        """
        check_pair(forecast, observed, self.lead_times)
        for metric in (self.table, self.errors, self.fractions, self.spectra):
            if metric is not None:
                metric.update(forecast, observed)
        self.windows += len(forecast)

    def compute(self) -> dict[str, Any]:
        """Return the scores as plain numbers.

        ``"all"`` pools every pixel of every lead time; ``"by_lead_time"`` holds lists of L. Their keys: ``mse``,
        ``pmse`` in (mm/5min)^2, ``mae`` and ``mean_error`` in mm/h, ``small_scale_power`` (forecast / observed),
        for thresholds ``csi@0.5`` and so on, and for neighbourhoods ``fss@0.5/15``. ``"spectrum"`` holds
        ``wavelength`` in pixels (R), ``forecast`` and ``observed`` (L x R) in (mm/h)^2. What is undefined is NaN.
        """
        leads = [self.interval_minutes * (lead + 1) for lead in range(self.lead_times)]
        pixels = self.errors.compute().reshape(-1, 4)[:, 3]
        report: dict[str, Any] = {
            "windows": self.windows,
            "pixels": int(pixels.sum()),
            "lead_minutes": leads,
            "thresholds_mm_per_hour": list(self.table.thresholds),
            "fss_scales_pixels": list(self.fractions.scales) if self.fractions else [],
            "scale_mm_per_5min": self.scale,
            "all": {name: float(value[0]) for name, value in self._scores(pooled=True).items()},
            "by_lead_time": {name: value.tolist() for name, value in self._scores(pooled=False).items()},
        }
        if self.spectra is not None:
            forecast, observed = self.spectra.compute().reshape(2, self.lead_times, -1)
            report["spectrum"] = {
                "wavelength_pixels": self.spectra.wavelengths().tolist(),
                "forecast": forecast.tolist(),
                "observed": observed.tolist(),
            }
        return report

    def reset(self) -> None:
        """Forget all windows."""
        self.windows = 0
        for metric in (self.table, self.errors, self.fractions, self.spectra):
            if metric is not None:
                metric.reset()

    def _scores(self, pooled: bool) -> dict[str, Tensor]:
        """Return tensors ``(L,)``, or ``(1,)`` where lead times are pooled before anything is divided."""

        def pool(sums: Tensor, *shape: int) -> Tensor:
            # torchmetrics makes a scalar of whatever has one element.
            sums = sums.reshape(self.lead_times, *shape)
            return sums.sum(0, keepdim=True) if pooled else sums

        found = rain_errors(pool(self.errors.compute(), 4), self.scale)
        if self.spectra is not None:
            small = self.spectra.small_scale_power()
            small = small.sum(1, keepdim=True) if pooled else small
            found["small_scale_power"] = ratio(small[0], small[1])
        thresholds = len(self.table.thresholds)
        scores = categorical_scores(Counts(*(pool(count, thresholds) for count in self.table.compute())))
        for name, values in scores.items():
            found |= {f"{name}@{t:g}": values[:, k] for k, t in enumerate(self.table.thresholds)}
        if self.fractions is not None:
            skill = fractions_skill(pool(self.fractions.compute(), thresholds, len(self.fractions.scales), 2))
            for k, threshold in enumerate(self.fractions.thresholds):
                found |= {f"fss@{threshold:g}/{s}": skill[:, k, i] for i, s in enumerate(self.fractions.scales)}
        return {name: value.to("cpu", torch.float64) for name, value in found.items()}
