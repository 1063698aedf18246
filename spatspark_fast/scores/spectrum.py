"""Radially averaged power spectra: does the forecast have as much small-scale structure as rain has?"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from spatspark_fast.scores.states import check_pair

__all__ = ["SMALL_SCALE", "SpectralPower", "radial_bins", "radial_power"]

SMALL_SCALE = 16.0
"""Wavelength in pixels below which structure counts as small-scale."""


def radial_bins(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Assign the coefficients of a real Fourier transform to rings of equal wavenumber.

    Returns the ring of each coefficient ``(H, W // 2 + 1)`` int64 and its weight (2 where it stands for a
    conjugate pair), 0 beyond the last ring. Ring r holds the wavenumbers that round to r cycles per the longer
    side; there are half as many rings as pixels along it.
    """
    side = max(height, width)
    rings = (side + 1) // 2
    rows = torch.fft.fftfreq(height, dtype=torch.float64) * side
    columns = torch.fft.rfftfreq(width, dtype=torch.float64) * side
    ring = torch.hypot(rows[:, None], columns[None, :]).round().long()
    weight = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    weights = weight.expand(height, -1) * (ring < rings)
    return ring.clamp(max=rings - 1), weights


def radial_power(fields: Tensor) -> Tensor:
    """Return the mean power of each ring ``(..., R)`` float64 of fields ``(..., H, W)`` without NaN.

    It is in the square of their unit.
    Equivalent to ``pysteps.utils.spectral.rapsd(field, fft_method=numpy.fft)`` for square fields; for others the
    wavenumber, not the index, is what makes a ring.
    """
    height, width = fields.shape[-2:]
    ring, weight = (part.to(fields.device) for part in radial_bins(height, width))
    power = torch.fft.rfft2(fields.double(), norm="ortho").abs().square() * weight
    rings = (max(height, width) + 1) // 2
    sums = torch.zeros(*fields.shape[:-2], rings, dtype=torch.float64, device=fields.device)
    sums.index_add_(-1, ring.flatten(), power.flatten(-2))
    counts = torch.zeros(rings, dtype=torch.float64, device=fields.device)
    return sums / counts.index_add_(0, ring.flatten(), weight.flatten())


class SpectralPower(Metric):
    """Average the power spectra of forecast and observation over windows, for every lead time.

    ``compute`` returns ``(2, L, R)`` float64, forecast and observation, in (mm/h)^2; NaN before the first frame.
    No data is 0 in both. A frame without any data is left out.
    """

    full_state_update = False
    sums: Tensor
    frames: Tensor

    def __init__(self, lead_times: int, height: int, width: int) -> None:
        super().__init__()
        self.lead_times = lead_times
        self.size = (height, width)
        rings = (max(height, width) + 1) // 2
        self.add_state("sums", default=torch.zeros(2, lead_times, rings, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", default=torch.zeros(lead_times, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, forecast: Tensor, observed: Tensor) -> None:
        """Add ``(B, L, H, W)`` mm/h; see `check_pair` for errors."""
        valid = check_pair(forecast, observed, self.lead_times)
        if tuple(forecast.shape[-2:]) != self.size:
            raise ValueError(f"fields are {tuple(forecast.shape[-2:])}, where the spectrum is of {self.size} pixels")
        nothing = torch.zeros((), dtype=forecast.dtype, device=forecast.device)
        for window, where in enumerate(valid):
            pair = torch.stack([forecast[window], observed[window].to(forecast.dtype)])
            # A frame without data is 0 everywhere, and so is its spectrum.
            self.sums += radial_power(torch.where(where, pair, nothing))
            self.frames += where.any(-1).any(-1)

    def compute(self) -> Tensor:
        """Return the mean spectra so far."""
        return self.sums / self.frames[:, None]

    def wavelengths(self) -> Tensor:
        """Return the wavelength of each ring ``(R,)`` in pixels; infinite for the first, the mean."""
        side = max(self.size)
        return side / torch.arange(self.sums.shape[-1], dtype=torch.float64)

    def small_scale_power(self) -> Tensor:
        """Return ``(2, L)``: the summed power of forecast and observation below ``SMALL_SCALE``.

        Each ring is weighted by its number of coefficients, so that the sum is the variance of those scales.
        """
        ring, weight = radial_bins(*self.size)
        counts = torch.zeros(self.sums.shape[-1], dtype=torch.float64).index_add_(0, ring.flatten(), weight.flatten())
        small = (self.wavelengths() < SMALL_SCALE) * counts
        return (self.sums * small.to(self.sums.device)).sum(-1)
