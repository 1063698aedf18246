"""Made-up radar looks like rain in the ways that can be counted, and follows from its seed."""

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.synthetic import SyntheticRadar


@pytest.fixture(scope="module")
def rates() -> np.ndarray:
    """Return eight windows, ``(8, 24, 288, 288)`` in mm/h."""
    radar = SyntheticRadar(8, seed=1)
    items = [radar[i] for i in range(8)]
    frames = torch.stack([torch.cat([item["input"], item["target"]]) for item in items])
    return units.mm_per_hour(frames, radar.scale).numpy()


def test_items_look_like_those_of_a_file() -> None:
    radar = SyntheticRadar(3, input_length=5, output_length=2, image_size=(64, 96))
    item = radar[-1]
    assert item["input"].shape == (5, 64, 96)
    assert item["target"].shape == (2, 64, 96)
    assert item["input"].dtype == item["target"].dtype == torch.float32
    assert item["index"] == 2
    assert (len(radar), radar.image_size, radar.scale) == (3, (64, 96), 47.83)
    assert radar.timestamps(0)[0] == "01-JAN-2000;00:05:00.000"
    assert len(radar.timestamps(0)) == 7
    radar.set_epoch(3)
    batch = next(iter(DataLoader(radar, batch_size=3)))
    assert torch.equal(batch["input"][2], item["input"])
    assert SyntheticRadar(1, output_length=0, image_size=40)[0]["target"].shape == (0, 40, 40)
    with pytest.raises(IndexError):
        radar[3]


def test_a_window_follows_from_seed_and_index() -> None:
    one, two, other = (SyntheticRadar(4, image_size=64, seed=seed) for seed in (5, 5, 6))
    torch.manual_seed(0)
    first = one[3]["input"]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert torch.equal(first, two[3]["input"])
    assert torch.equal(state, torch.random.get_rng_state())  # nor does it touch the global generator
    assert not torch.equal(first, other[3]["input"])
    assert not torch.equal(first, one[2]["input"])


def test_values_are_rain(rates: np.ndarray) -> None:
    assert np.isfinite(rates).all()
    assert rates.min() == 0.0
    steps = rates / 0.12  # KNMI's step, 0.01 mm in 5 min
    np.testing.assert_allclose(steps, np.round(steps), atol=2e-3)
    wet = rates[rates > 0]
    # KNMI on 26 August 2010: 0.24, 0.48, 2.0 and 4.9 mm/h
    quantiles = np.quantile(wet, [0.25, 0.5, 0.9, 0.99])
    assert (quantiles > [0.1, 0.2, 0.8, 2.0]).all(), quantiles
    assert (quantiles < [0.7, 1.2, 5.0, 15.0]).all(), quantiles
    assert rates.max() < 150.0


def test_about_half_is_wet_and_windows_differ(rates: np.ndarray) -> None:
    wet = (rates > 0).mean(axis=(1, 2, 3))
    assert 0.35 < wet.mean() < 0.65, wet
    assert wet.min() > 0.15
    assert wet.max() < 0.9
    assert wet.std() > 0.05


def test_rain_is_intermittent_and_of_many_scales(rates: np.ndarray) -> None:
    frames = np.log(np.maximum(rates[:, 0], 0.06))
    spectrum = np.mean(np.abs(np.fft.rfft2(frames - frames.mean(axis=(1, 2), keepdims=True))) ** 2, axis=0)
    waves = np.hypot(np.fft.fftfreq(288)[:, None], np.fft.rfftfreq(288)[None])
    power = [np.log10(spectrum[(waves >= low) & (waves < 2 * low)].mean()) for low in (0.01, 0.02, 0.04, 0.08)]
    falls = -np.diff(power)
    assert (falls > 0.4).all(), power  # KNMI: about 0.9 for each doubling of the wavenumber
    assert (falls < 1.5).all(), power


def test_rain_travels_and_changes(rates: np.ndarray) -> None:
    """The frame five steps on resembles the present one best after a shift, and never is the same."""
    shifts, gains = [], []
    for window in rates:
        now, later = (np.log(np.maximum(window[i], 0.06)) for i in (5, 10))
        now, later = now - now.mean(), later - later.mean()
        correlation = np.fft.irfft2(np.fft.rfft2(later) * np.conj(np.fft.rfft2(now)), s=now.shape)
        correlation /= 288 * 288 * now.std() * later.std()
        place = np.unravel_index(correlation.argmax(), correlation.shape)
        shifts.append(math.hypot(*(min(int(p), 288 - int(p)) for p in place)) / 5)
        gains.append(correlation.max() - correlation[0, 0])
        assert 0.3 < correlation.max() < 0.99
    assert np.median(shifts) > 1.0, shifts
    assert max(shifts) < 9.0, shifts
    assert np.mean(gains) > 0.1, gains


def test_making_a_window_takes_a_tenth_of_a_second() -> None:
    radar = SyntheticRadar(9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        radar[8]
        spent = []
        for index in range(8):
            start = time.process_time()  # of this process, whatever else the machine does
            radar[index]
            spent.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(spent) < 0.2, spent  # measured: 0.05 to 0.07 s; twice that is a defect, not a slow machine


@pytest.mark.parametrize(
    "options",
    [
        *({"num_windows": 0}, {"input_length": 0}, {"output_length": -1}, {"image_size": 0}),
        *({"wet_fraction": (0.5, 1.0)}, {"num_windows": 2**63}, {"output_length": 2**31 - 1}, {"image_size": 2**63}),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"synthetic radar (needs|has at most)|wet_fraction|do not fit into the memory"):
        SyntheticRadar(**{"num_windows": 1, **options})
