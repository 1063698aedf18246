"""Unit conversions agree with hand-computed figures and with each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatspark_fast.common import units


def test_one_normalised_unit_is_twelve_scales_per_hour() -> None:
    assert units.mm_per_hour(1.0) == pytest.approx(573.96)
    assert units.mm_per_hour(1.0, units.SPATSPARK_SCALE) == pytest.approx(566.16)


def test_knmi_reflectivity_formula_is_marshall_palmer() -> None:
    pixel_value = np.arange(70, 250)
    published = 10.0 ** ((pixel_value - 109.0) / 32.0)
    ours = units.dbz_to_mm_per_hour(0.5 * pixel_value - 31.5, "marshall_palmer")
    np.testing.assert_allclose(ours, published, rtol=2e-3)  # KNMI rounds 10 log10(200) = 23.01 to 23


def test_fmi_relation_at_40_dbz() -> None:
    assert units.dbz_to_mm_per_hour(40.0, "fmi") == pytest.approx((1e4 / 223.0) ** (1 / 1.53))


@given(st.floats(1e-3, 500.0), st.sampled_from(sorted(units.ZR_RELATIONS)))
def test_reflectivity_round_trip(rate: float, relation: str) -> None:
    assert units.dbz_to_mm_per_hour(units.mm_per_hour_to_dbz(rate, relation), relation) == pytest.approx(rate)


@given(st.floats(0.0, 500.0), st.floats(1.0, 100.0))
def test_rate_round_trips(rate: float, scale: float) -> None:
    assert units.mm_per_hour(units.normalised(rate, scale), scale) == pytest.approx(rate)
    depth = units.mm_per_hour_to_mm_per_5min(rate)
    assert units.mm_per_5min_to_mm_per_hour(depth) == pytest.approx(rate)
    assert units.depth_to_mm_per_5min(depth * 3, 15.0) == pytest.approx(depth)


def test_arrays_and_tensors_keep_their_kind() -> None:
    array = np.array([0.0, 0.5], dtype=np.float32)
    assert units.mm_per_hour(array).dtype == np.float32
    tensor = torch.tensor([0.0, 0.5])
    torch.testing.assert_close(units.mm_per_hour(tensor), torch.from_numpy(units.mm_per_hour(array)))
    assert isinstance(units.dbz_to_mm_per_hour(tensor), torch.Tensor)


def test_no_rain_has_no_reflectivity() -> None:
    assert units.mm_per_hour_to_dbz(0.0) == -math.inf


def test_wet_threshold_is_below_one_knmi_step() -> None:
    assert 0.0 < units.MIN_WET_RATE < units.mm_per_5min_to_mm_per_hour(0.01)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: units.dbz_to_mm_per_hour(20.0, "nowhere"), "nowhere"),
        (lambda: units.depth_to_mm_per_5min(1.0, 0.0), "minutes=0"),
        (lambda: units.mm_per_hour_to_dbz(-1.0), "negative"),
    ],
)
def test_wrong_arguments_are_named(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
