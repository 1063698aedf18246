"""Losses of forecasts: what they measure, and that missing pixels count nowhere."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from spatspark_fast.common.units import NL50_SCALE, mm_per_hour, normalised
from spatspark_fast.finetune.loss import ForecastLoss, balanced_weights, fourier_amplitude_error


def rain(seed: int, *shape: int) -> torch.Tensor:
    """Return values of rain, a third of them wet, in data units."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalised(4 * (noise - 0.4).clamp(min=0)).float()


def test_the_published_loss_in_square_millimetres() -> None:
    prediction, target = rain(0, 2, 3, 32, 40), rain(1, 2, 3, 32, 40)
    mse = (prediction - target).square().mean()
    similarity = structural_similarity_index_measure(prediction, target, data_range=1.0)
    assert isinstance(similarity, torch.Tensor)
    expected = NL50_SCALE**2 * (mse + 1e-4 * (1 - similarity))
    torch.testing.assert_close(ForecastLoss(NL50_SCALE)(prediction, target), expected)
    # (mm/5min)^2: from rates by another way.
    depth_error = (mm_per_hour(prediction) - mm_per_hour(target)).square().mean() / 144
    torch.testing.assert_close(ForecastLoss(NL50_SCALE, ssim_weight=0.0)(prediction, target), depth_error)


@pytest.mark.parametrize(
    "loss",
    [
        ForecastLoss(1.0, ssim_weight=0.0),
        ForecastLoss(1.0),
        ForecastLoss(1.0, weighting="rain"),
        ForecastLoss(1.0, spectral_weight=0.5),
    ],
    ids=["mse", "ssim", "rain", "spectral"],
)
def test_missing_pixels_count_nowhere(loss: ForecastLoss) -> None:
    prediction, target = rain(0, 2, 3, 32, 40).requires_grad_(), rain(1, 2, 3, 32, 40)
    missing = torch.zeros_like(target, dtype=torch.bool)
    missing[0, 1:, 5:25, 7:30] = True
    holes = target.masked_fill(missing, torch.nan)
    value = loss(prediction, holes)
    value.backward()
    assert value.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad[missing].abs().max() == 0
    assert prediction.grad[~missing].abs().max() > 0
    wild = torch.where(missing, 1e3, prediction.detach())
    torch.testing.assert_close(loss(wild, holes), value.detach())


def test_the_error_is_the_mean_over_pixels_with_data() -> None:
    prediction, target = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    target[..., 8:] = torch.nan
    assert ForecastLoss(1.0, ssim_weight=0.0)(prediction, target) == 1.0


def test_without_any_data_the_loss_is_zero() -> None:
    prediction = rain(0, 1, 2, 16, 16).requires_grad_()
    loss = ForecastLoss(1.0, weighting="rain", spectral_weight=1.0)
    value = loss(prediction, torch.full((1, 2, 16, 16), torch.nan))
    value.backward()
    assert value == 0
    assert prediction.grad is not None
    assert prediction.grad.abs().max() == 0


def test_heavy_rain_weighs_more() -> None:
    rates = torch.tensor([0.0, 1.9, 2.0, 4.9, 5.0, 10.0, 29.0, 30.0, 120.0])
    assert balanced_weights(rates).tolist() == [1, 1, 2, 2, 5, 10, 10, 30, 30]
    target = normalised(torch.full((1, 1, 16, 16), 12.0))
    plain = ForecastLoss(NL50_SCALE, ssim_weight=0.0)
    weighted = ForecastLoss(NL50_SCALE, ssim_weight=0.0, weighting="rain")
    torch.testing.assert_close(weighted(target * 0.5, target), 10 * plain(target * 0.5, target))


def test_amplitudes_do_not_see_where_rain_is_but_see_blur() -> None:
    target = rain(1, 2, 3, 32, 40).double()
    moved = target.roll((5, -7), (2, 3))
    assert fourier_amplitude_error(moved, target) < 1e-6 * (moved - target).square().mean()
    blurred = torch.nn.functional.avg_pool2d(target, 5, stride=1, padding=2)
    error = fourier_amplitude_error(blurred, target)
    assert 0.1 * (blurred - target).square().mean() < error < (blurred - target).square().mean()
    spectra = [torch.fft.fft2(x, norm="ortho").abs() for x in (blurred, target)]
    torch.testing.assert_close(error, (spectra[0] - spectra[1]).square().mean(), rtol=1e-4, atol=0)


def test_autocast_does_not_reach_the_loss() -> None:
    prediction, target = rain(0, 2, 3, 32, 40), rain(1, 2, 3, 32, 40)
    loss = ForecastLoss(NL50_SCALE, spectral_weight=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(prediction, target)
    assert torch.equal(inside, loss(prediction, target))
