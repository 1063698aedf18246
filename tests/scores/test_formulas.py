"""Scores of contingency tables: by hand, by identity, and as pysteps has them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spatspark_fast.scores.formulas import CATEGORICAL_SCORES, Counts, categorical_scores
from spatspark_fast.scores.states import ContingencyTable
from tests.scores.pysteps_oracle import pysteps_module


def scores(hits: int, misses: int, false_alarms: int, negatives: int) -> dict[str, float]:
    counts = Counts(*(torch.tensor(count) for count in (hits, misses, false_alarms, negatives)))
    return {name: value.item() for name, value in categorical_scores(counts).items()}


def test_by_hand() -> None:
    # Finley's tornado forecasts of 1884, the textbook table: 28 hits, 23 misses, 72 false alarms.
    found = scores(28, 23, 72, 2680)
    assert found["accuracy"] == pytest.approx(2708 / 2803)
    assert found["precision"] == pytest.approx(0.28)
    assert found["recall"] == pytest.approx(28 / 51)
    assert found["f1"] == pytest.approx(56 / 151)
    assert found["csi"] == pytest.approx(28 / 123)
    assert found["far"] == pytest.approx(0.72)
    assert found["hss"] == pytest.approx(0.355, abs=5e-4)  # as published
    assert found["bias"] == pytest.approx(100 / 51)
    assert set(found) == set(CATEGORICAL_SCORES)


def test_what_is_undefined_is_nan() -> None:
    dry = scores(0, 0, 0, 10)
    assert dry.pop("accuracy") == 1.0
    assert all(math.isnan(value) for value in dry.values())
    assert all(math.isnan(value) for value in scores(0, 0, 0, 0).values())
    missed = scores(0, 5, 0, 5)
    assert math.isnan(missed["precision"])
    assert math.isnan(missed["far"])
    assert (missed["recall"], missed["csi"], missed["f1"], missed["bias"], missed["hss"]) == (0, 0, 0, 0, 0)


RATES = st.sampled_from([0.0, 0.1, 0.2, 0.21, 0.5, 0.7, 1.0, 3.0, 12.0, float("nan")])
FIELDS = arrays.arrays(np.float32, (2, 3, 5, 4), elements=RATES)


@given(forecast=FIELDS, observed=FIELDS)
def test_counts_are_those_of_the_definition(forecast: np.ndarray, observed: np.ndarray) -> None:
    thresholds = (0.2, 0.5, 1.0)
    table = ContingencyTable(3, thresholds)
    table.update(torch.from_numpy(forecast), torch.from_numpy(observed))
    counts = table.compute()
    valid = np.isfinite(forecast) & np.isfinite(observed)
    for k, threshold in enumerate(np.array(thresholds, dtype=np.float32)):
        wet, was = forecast > threshold, observed > threshold
        expected = (wet & was, ~wet & was, wet & ~was, ~wet & ~was)
        for count, where in zip(counts, expected, strict=True):
            assert count[:, k].tolist() == (where & valid).sum((0, 2, 3)).tolist()


@given(observed=FIELDS)
def test_a_perfect_forecast_is_perfect(observed: np.ndarray) -> None:
    table = ContingencyTable(3, (0.2, 1.0))
    table.update(torch.from_numpy(observed), torch.from_numpy(observed))
    perfect = {"far": 0.0}
    for name, value in categorical_scores(table.compute()).items():
        defined = value[~value.isnan()]
        assert torch.equal(defined, torch.full_like(defined, perfect.get(name, 1.0))), name


@given(forecast=FIELDS, observed=FIELDS)
def test_batches_add_up(forecast: np.ndarray, observed: np.ndarray) -> None:
    ours, theirs = torch.from_numpy(forecast), torch.from_numpy(observed)
    whole, parts = ContingencyTable(3, (0.2, 1.0)), ContingencyTable(3, (0.2, 1.0))
    whole.update(ours, theirs)
    for window in range(len(ours)):
        parts.update(ours[window : window + 1], theirs[window : window + 1])
    assert torch.equal(whole.table, parts.table)


@pytest.mark.parametrize("threshold", [0.2, 1.0, 5.0])
def test_agreement_with_pysteps(threshold: float) -> None:
    verification = pysteps_module("pysteps.verification.detcatscores")
    rng = np.random.default_rng(7)
    forecast, observed = rng.gamma(0.4, 3.0, (2, 40, 50)).astype(np.float32)
    observed[:5] = np.nan
    forecast[:, :3] = np.nan
    table = ContingencyTable(1, (threshold,))
    table.update(torch.from_numpy(forecast)[None, None], torch.from_numpy(observed)[None, None])
    ours = categorical_scores(table.compute())
    valid = np.isfinite(forecast) & np.isfinite(observed)
    theirs = verification.det_cat_fct(
        forecast[valid], observed[valid], threshold, ["ACC", "POD", "FAR", "CSI", "HSS", "BIAS", "F1"]
    )
    names = {"ACC": "accuracy", "POD": "recall", "FAR": "far", "CSI": "csi", "HSS": "hss", "BIAS": "bias", "F1": "f1"}
    for name, value in theirs.items():
        assert ours[names[name]].item() == pytest.approx(value, rel=1e-12), name
    assert ours["precision"].item() == pytest.approx(1 - theirs["FAR"], rel=1e-12)


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5), (-1.0,), (float("nan"),)])
def test_wrong_thresholds_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        ContingencyTable(3, thresholds)
