"""Score a forecast while it is learned: squared error, structure, and two ways towards sharper rain.

All terms are in (mm per 5 min)^2, that is the squared data unit times ``scale ** 2``: a constant factor that
brings gradients to a size at which the small constants of optimisers do not matter. Pixels without data count
nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from spatspark_fast.common.units import mm_per_hour
from spatspark_fast.finetune.config import Weighting

__all__ = ["BALANCED_WEIGHTS", "ForecastLoss", "balanced_weights", "fourier_amplitude_error"]

BALANCED_WEIGHTS = ((2.0, 2.0), (5.0, 5.0), (10.0, 10.0), (30.0, 30.0))
"""Rates in mm/h from which on a pixel weighs so much; below the first it weighs 1 (arXiv 1706.03458, B-MSE)."""


def balanced_weights(rate: Tensor) -> Tensor:
    """Return how much each pixel weighs, by its observed ``rate`` in mm/h: 1, 2, 5, 10 or 30."""
    weights = torch.ones_like(rate)
    for threshold, weight in BALANCED_WEIGHTS:
        weights = torch.where(rate >= threshold, weight, weights)
    return weights


def fourier_amplitude_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of Fourier amplitudes of ``(B, T, H, W)``, a scalar.

    It asks for the right power at every scale and not for the right place, so a blurred forecast pays. With the
    unitary transform it is at most the mean squared error. Amplitude part of arXiv 2410.23159. Equivalent to::

        a, b = torch.fft.fft2(prediction, norm="ortho"), torch.fft.fft2(target, norm="ortho")
        (a.abs() - b.abs()).square().mean()
    """
    # The root has no gradient at 0: a constant far below any amplitude of rain.
    spectra = [torch.view_as_real(torch.fft.fft2(x, norm="ortho")) for x in (prediction, target)]
    amplitudes = [(spectrum.square().sum(-1) + 1e-12).sqrt() for spectrum in spectra]
    return (amplitudes[0] - amplitudes[1]).square().mean()


class ForecastLoss(nn.Module):
    """Compute ``scale^2 * (MSE + ssim_weight * (1 - SSIM) + spectral_weight * amplitude error)``.

    ``ssim_weight`` 1e-4 is the paper's. ``weighting="rain"`` multiplies squared errors by `balanced_weights`.
    SSIM takes data values from 0 to 1 as its range, as the published code does.

    Args:
        scale: mm per 5 min of data value 1.
    """

    def __init__(
        self, scale: float, ssim_weight: float = 1e-4, weighting: Weighting = "none", spectral_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.ssim_weight = ssim_weight
        self.weighting: Weighting = weighting
        self.spectral_weight = spectral_weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Score a ``prediction`` of ``target``, both ``(B, T, H, W)`` in data units; NaN in the target is no data.

        Without any valid pixel the loss is 0, with gradients of 0.
        """
        # Structure is a small difference of squares, which half precision would drown.
        with torch.autocast(prediction.device.type, enabled=False):
            return self._score(prediction.float(), target)

    def _score(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = ~target.isnan()
        target = target.nan_to_num(nan=0.0).float()
        # Equal to the target where that is unknown: no error, no gradient.
        prediction = torch.where(valid, prediction, target)
        count = valid.sum().clamp(min=1)
        squares = (prediction - target).square()
        if self.weighting == "rain":
            squares = squares * balanced_weights(mm_per_hour(target, self.scale))
        loss = squares.sum() / count
        if self.ssim_weight > 0:
            _, similarity = structural_similarity_index_measure(
                prediction, target, data_range=1.0, return_full_image=True
            )
            loss = loss + self.ssim_weight * ((1 - similarity) * valid).sum() / count
        if self.spectral_weight > 0:
            loss = loss + self.spectral_weight * fourier_amplitude_error(prediction, target)
        return loss * self.scale**2
