"""Errors, fractions skill and power spectra: by hand, by identity, and as pysteps and SciPy have them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatspark_fast.scores.fractions import FractionsSkill, RunningSums, fractions_skill
from spatspark_fast.scores.nowcast import NowcastScores
from spatspark_fast.scores.spectrum import SpectralPower, radial_power
from spatspark_fast.scores.states import RainErrors, rain_errors
from tests.scores.pysteps_oracle import pysteps_module


def rain(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).gamma(0.4, 3.0, shape).astype(np.float32))


def test_errors_by_hand_and_in_their_units() -> None:
    observed = torch.tensor([[[[0.0, 12.0], [24.0, math.nan]]]])  # mm/h
    forecast = torch.tensor([[[[0.0, 0.0], [36.0, 5.0]]]])
    errors = RainErrors(1)
    errors.update(forecast, observed)
    found = {name: value.item() for name, value in rain_errors(errors.compute(), scale=2.0).items()}
    # 12 mm/h are 1 mm in 5 minutes: two errors of 1 over three pixels.
    assert found["pmse"] == pytest.approx(2 / 3)
    assert found["mse"] == pytest.approx(2 / 3 / 4)
    assert found["mae"] == pytest.approx(8.0)
    assert found["mean_error"] == pytest.approx(0.0)


def test_nothing_observed_is_nan() -> None:
    scores = NowcastScores(1, (8, 8), thresholds=(1.0,), fss_scales=(3,))
    scores.update(torch.ones(1, 1, 8, 8), torch.full((1, 1, 8, 8), math.nan))
    found = scores.compute()
    assert found["pixels"] == 0
    assert all(math.isnan(value) for value in found["all"].values())
    assert all(math.isnan(value) for value in found["spectrum"]["observed"][0])


@given(side=st.integers(1, 9), height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_box_counts_are_those_of_a_loop(side: int, height: int, width: int, seed: int) -> None:
    events = np.random.default_rng(seed).random((height, width)) < 0.4
    counts = RunningSums(torch.from_numpy(events), side).counts(side).numpy()
    padded = np.pad(events, ((side // 2, side), (side // 2, side)))
    for row in range(height):
        for column in range(width):
            assert counts[row, column] == padded[row : row + side, column : column + side].sum()


def test_sides_share_one_running_sum() -> None:
    events = rain(2, 30, 20) > 1.0
    shared = RunningSums(events, 15)
    for side in (1, 2, 7, 14, 15):
        assert torch.equal(shared.counts(side), RunningSums(events, side).counts(side))


@pytest.mark.parametrize("scale", [1, 4, 5, 15])
@pytest.mark.parametrize("threshold", [0.5, 5.0])
def test_fractions_skill_agrees_with_pysteps(scale: int, threshold: float) -> None:
    spatial = pysteps_module("pysteps.verification.spatialscores")
    forecast, observed = rain(2, 1, 1, 60, 48)
    observed[..., :9, 30:] = math.nan
    forecast[..., :9, 30:] = math.nan  # pysteps fills each field for itself, we where either has no data
    metric = FractionsSkill(1, (threshold,), (scale,))
    metric.update(forecast, observed)
    theirs = spatial.fss(forecast[0, 0].numpy(), observed[0, 0].numpy(), threshold, scale)
    assert fractions_skill(metric.compute()).item() == pytest.approx(theirs, rel=1e-6)


def test_fractions_skill_by_hand() -> None:
    observed, forecast = torch.zeros(2, 1, 1, 9, 9)
    observed[0, 0, 4, 4] = forecast[0, 0, 4, 5] = 1.0  # one pixel too far to the east
    metric = FractionsSkill(1, (0.5,), (1, 3))
    metric.update(forecast, observed)
    # Of two neighbourhoods of 9 pixels that contain the event, 6 agree: 1 - 6 / 18.
    assert fractions_skill(metric.compute()).flatten().tolist() == pytest.approx([0.0, 1 - 6 / 18])
    metric.reset()
    metric.update(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9))
    assert fractions_skill(metric.compute()).isnan().all()


@pytest.mark.parametrize("size", [48, 33])
def test_spectrum_agrees_with_pysteps(size: int) -> None:
    spectral = pysteps_module("pysteps.utils.spectral")
    field = rain(size, size)
    theirs = spectral.rapsd(field.double().numpy(), fft_method=np.fft)
    assert radial_power(field).numpy() == pytest.approx(theirs, rel=1e-9)


def test_a_wave_has_its_power_at_its_length() -> None:
    x = torch.arange(64, dtype=torch.float64)
    wave = torch.sin(2 * torch.pi * x / 8).expand(48, 64)  # 8 pixels, on an image that is not square
    metric = SpectralPower(1, 48, 64)
    metric.update(wave[None, None].float(), wave[None, None].float())
    power = metric.compute()[0, 0]
    assert metric.wavelengths()[power.argmax()].item() == 8.0
    assert power.sort().values[-2] < 1e-6 * power.max()


def test_blur_loses_small_scale_power_and_keeps_the_mean() -> None:
    observed = rain(3, 2, 64, 64)
    blurred = torch.nn.functional.avg_pool2d(observed, 5, stride=1, padding=2, count_include_pad=False)
    scores = NowcastScores(2, (64, 64))
    scores.update(blurred, observed)
    found = scores.compute()
    assert found["all"]["small_scale_power"] < 0.1
    assert found["all"]["mean_error"] == pytest.approx(0, abs=0.02)
    assert found["all"]["fss@1/15"] > found["all"]["fss@1/1"] > 0


def test_identities_of_a_perfect_forecast() -> None:
    observed = rain(2, 3, 32, 40)
    observed[:, :, 5:9] = math.nan
    scores = NowcastScores(3, (32, 40), thresholds=(0.5, 2.0), fss_scales=(1, 7))
    scores.update(observed, observed)
    found = scores.compute()["all"]
    assert {found[name] for name in ("mse", "pmse", "mae", "mean_error", "far@0.5", "far@2")} == {0.0}
    ones = ("small_scale_power", "fss@0.5/1", "fss@2/7", "csi@2", "hss@0.5", "bias@2", "accuracy@0.5")
    assert [found[name] for name in ones] == pytest.approx([1.0] * len(ones))


def test_batches_lead_times_and_resets_add_up() -> None:
    forecast, observed = rain(2, 4, 3, 32, 32)
    observed[1, 2, :8] = math.nan
    whole, parts = NowcastScores(3, (32, 32)), NowcastScores(3, (32, 32))
    parts.update(forecast, observed)
    parts.reset()
    whole.update(forecast, observed)
    for window in range(4):
        parts.update(forecast[window : window + 1], observed[window : window + 1])
    ours, theirs = whole.compute(), parts.compute()
    assert ours["windows"] == theirs["windows"] == 4
    assert ours["all"] == pytest.approx(theirs["all"], rel=1e-9, nan_ok=True)
    # One lead time alone scores like its row among the others.
    alone = NowcastScores(1, (32, 32))
    alone.update(forecast[:, 1:2], observed[:, 1:2])
    row = {name: values[1] for name, values in ours["by_lead_time"].items()}
    assert alone.compute()["all"] == pytest.approx(row, rel=1e-9, nan_ok=True)


def test_no_data_counts_nowhere() -> None:
    forecast, observed = rain(2, 1, 1, 32, 32)
    observed[..., 20:] = math.nan
    wild = forecast.clone()
    wild[..., 20:] = 500.0
    found = []
    for one in (forecast, wild):
        scores = NowcastScores(1, (32, 32))
        scores.update(one, observed)
        found.append(scores.compute()["all"])
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert not any(math.isnan(value) for value in found[0].values())


@pytest.mark.parametrize(
    ("forecast", "observed"), [((1, 2, 8, 8), (1, 3, 8, 8)), ((1, 2, 8, 8),) * 2, ((3, 8, 8),) * 2]
)
def test_wrong_shapes_are_refused(forecast: tuple[int, ...], observed: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 lead times"):
        NowcastScores(3, (8, 8)).update(torch.zeros(forecast), torch.zeros(observed))


def test_states_survive_saving_and_devices_have_their_own() -> None:
    scores = NowcastScores(2, (16, 16))
    scores.update(rain(1, 2, 16, 16), rain(1, 2, 16, 16, seed=1))
    assert {metric.device.type for metric in (scores.table, scores.errors)} == {"cpu"}
    moved = scores.to("meta")
    assert moved.table.table.device.type == "meta"


@pytest.mark.parametrize("scales", [(0,), (1.5,), (-3,)])
def test_wrong_scales_are_refused(scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scales"):
        FractionsSkill(1, (1.0,), scales)
