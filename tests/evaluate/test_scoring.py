"""Evaluation: the same pixels for everybody, in the units they claim, whatever the batch and the file's scale."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.evaluate.scoring import ScoringOptions, evaluate_forecaster, evaluate_predictors, spread
from spatspark_fast.forecast.predictors import ModelPredictor, PersistencePredictor
from spatspark_fast.models.forecaster import Persistence
from spatspark_fast.scores.nowcast import NowcastScores
from tests.forecast.forecasts import Shift, loaded, moving_rain, save_checkpoint, write_windows

FEW: dict[str, Any] = {"thresholds": (0.5, 2.0), "fss_scales": (5,), "spectrum": True}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_windows(tmp_path / "windows.h5", moving_rain(5, 8, 40, 48))


class Silent:
    """Say nothing of the left half, and dry of the right."""

    name, in_length, max_steps = "silent", 1, None

    def predict(self, rates: Tensor, steps: int) -> Tensor:
        made = torch.zeros(rates.shape[0], steps, *rates.shape[2:])
        made[..., : rates.shape[3] // 2] = math.nan
        return made


def test_scores_are_those_of_the_forecasts(file: Path) -> None:
    rates = moving_rain(5, 8, 40, 48)
    found = evaluate_forecaster(Persistence(4, 3), file, **FEW)
    expected = NowcastScores(3, (40, 48), **FEW)
    expected.update(torch.from_numpy(rates[:, 3:4]).expand(-1, 3, -1, -1), torch.from_numpy(rates[:, 4:7]))
    assert found["windows"] == 5
    assert found["lead_minutes"] == [5, 10, 15]
    assert found["all"] == pytest.approx(expected.compute()["all"], rel=1e-4)


def test_who_knows_the_motion_beats_persistence(file: Path) -> None:
    windows = NowcastDataset(file, "test", 4, include_valid=True)
    scores = evaluate_predictors([ModelPredictor(loaded(Shift(multiple=1))), PersistencePredictor()], windows).scores
    assert scores["shift"]["all"]["pmse"] < 0.3 * scores["persistence"]["all"]["pmse"]
    assert scores["shift"]["all"]["csi@1"] > 0.97 > 0.95 > scores["persistence"]["all"]["csi@1"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_do_not_matter(file: Path, batch_size: int) -> None:
    whole = evaluate_forecaster(Shift(), file, batch_size=64, **FEW)
    parts = evaluate_forecaster(Shift(), file, batch_size=batch_size, **FEW)
    assert parts["all"] == pytest.approx(whole["all"], rel=1e-6)


def test_the_scale_of_the_file_is_not_that_of_the_model(file: Path, tmp_path: Path) -> None:
    class Offset(Shift):
        def forward(self, frames: Tensor) -> Tensor:
            return super().forward(frames) + 0.01  # in data units of the model

    other = write_windows(tmp_path / "other.h5", moving_rain(5, 8, 40, 48), scale=10.0)
    one, two = (evaluate_forecaster(Offset(), path, scale=47.83, **FEW) for path in (file, other))
    for key in ("pmse", "mean_error", "csi@2", "fss@0.5/5"):
        assert two["all"][key] == pytest.approx(one["all"][key], rel=1e-4), key
    assert two["all"]["mse"] == pytest.approx(one["all"]["pmse"] / 100, rel=1e-4)
    own = evaluate_forecaster(Offset(), other, **FEW)  # without a scale: that of the data
    assert own["all"]["mean_error"] < two["all"]["mean_error"]


def test_pixels_without_data_do_not_count(tmp_path: Path) -> None:
    rates = moving_rain(3, 7, 32, 32)
    missing = np.zeros(rates.shape, bool)
    missing[:, 4:, :, 20:] = True
    spoilt = np.where(missing, 99.0, rates)
    one, two = (
        evaluate_forecaster(Persistence(4, 3), write_windows(tmp_path / f"{i}.h5", r, missing=missing), **FEW)
        for i, r in enumerate((rates, spoilt))
    )
    assert one["pixels"] == 3 * 3 * 32 * 20
    assert one["all"] == pytest.approx(two["all"], rel=1e-6)


def test_what_is_not_said_is_dry_or_left_out_for_all(file: Path) -> None:
    windows = NowcastDataset(file, "test", 4, include_valid=True)
    both = [Silent(), PersistencePredictor()]
    observed = evaluate_predictors(both, windows, ScoringOptions(region="observed", **FEW)).scores
    common = evaluate_predictors(both, windows, ScoringOptions(region="common", **FEW)).scores
    alone = evaluate_predictors(both[1:], windows, ScoringOptions(**FEW)).scores
    assert observed["persistence"]["all"] == alone["persistence"]["all"]
    assert observed["silent"]["pixels"] == 2 * common["silent"]["pixels"] == 2 * common["persistence"]["pixels"]
    assert common["persistence"]["all"]["pmse"] != alone["persistence"]["all"]["pmse"]
    assert observed["silent"]["all"]["recall@0.5"] == 0.0
    assert observed["silent"]["silent_share"] == common["silent"]["silent_share"] == [0.5] * 4


def test_models_of_other_lengths_forecast_from_the_same_present(file: Path) -> None:
    windows = NowcastDataset(file, "test", 4, include_valid=True)
    pair = [ModelPredictor(loaded(Shift(2, 2), "short")), ModelPredictor(loaded(Shift(4, 4), "long"))]
    scores = evaluate_predictors(pair, windows).scores
    assert scores["short"]["all"] == scores["long"]["all"]
    assert scores["long"]["lead_minutes"] == [5, 10]


def test_windows_kept_for_pictures_are_what_was_scored(file: Path) -> None:
    windows = NowcastDataset(file, "test", 4, include_valid=True)
    found = evaluate_predictors([PersistencePredictor()], windows, ScoringOptions(batch_size=2), keep=[1, 4])
    rates = moving_rain(5, 8, 40, 48)
    assert [kept.index for kept in found.kept] == [1, 4]
    for kept in found.kept:
        assert np.allclose(kept.now, rates[kept.index, 3], atol=1e-4)
        assert np.allclose(kept.observed, rates[kept.index, 4:], atol=1e-4)
        assert torch.equal(kept.forecasts["persistence"][2], kept.now)


def test_the_mode_of_the_model_is_kept_and_checkpoints_are_taken(file: Path, tmp_path: Path) -> None:
    model = Shift().train()
    evaluate_forecaster(model, file, **FEW)
    assert model.training
    checkpoint = save_checkpoint(tmp_path / "m.ckpt", lengths=(4, 3))
    assert evaluate_forecaster(checkpoint, file, max_windows=2, **FEW)["windows"] == 2


def test_made_up_radar_serves_too() -> None:
    radar = SyntheticRadar(2, input_length=4, output_length=3, image_size=64)
    assert evaluate_forecaster(Persistence(4, 3), radar, **FEW)["all"]["csi@0.5"] > 0.2


def test_what_cannot_be_scored_is_refused(file: Path) -> None:
    windows = NowcastDataset(file, "test", 4, include_valid=True)
    cases: tuple[tuple[list[Any], dict[str, Any], str], ...] = (
        ([], {}, "nothing to score"),
        ([ModelPredictor(loaded(Shift(6)))], {}, "reads 6 frames"),
        ([PersistencePredictor()], {"steps": 5}, "from 1 to 4"),
        ([PersistencePredictor(), PersistencePredictor()], {}, "must differ"),
    )
    for predictors, options, word in cases:
        with pytest.raises(UserError, match=word):
            evaluate_predictors(predictors, windows, ScoringOptions(**options))
    with pytest.raises(UserError, match="nothing to compare"):
        evaluate_predictors([PersistencePredictor()], NowcastDataset(file, "test", 8, include_valid=True))


def test_a_model_that_gives_nan_is_refused(file: Path) -> None:
    class Broken(Shift):
        def forward(self, frames: Tensor) -> Tensor:
            return super().forward(frames) / 0

    with pytest.raises(UserError, match="not finite"):
        evaluate_forecaster(Broken(), file)


def test_indices_are_spread_evenly() -> None:
    assert spread(10, 3) == [0, 4, 9]
    assert spread(3, 10) == [0, 1, 2]
    assert spread(9, 1) == [4]
    assert all(len(set(spread(n, k))) == min(n, k) for n in range(1, 20) for k in range(1, 25))


def test_memory_does_not_grow_with_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a batch of windows is read before the one before it is scored."""
    alive, most = 0, 0
    read, update = NowcastDataset.__getitem__, NowcastScores.update

    def counting_read(self: NowcastDataset, index: int) -> dict:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return read(self, index)

    def counting_update(self: NowcastScores, forecast: Tensor, observed: Tensor) -> None:
        nonlocal alive
        alive -= len(forecast)
        update(self, forecast, observed)

    monkeypatch.setattr(NowcastDataset, "__getitem__", counting_read)
    monkeypatch.setattr(NowcastScores, "update", counting_update)
    evaluate_forecaster(Shift(), file, batch_size=2, **FEW)
    assert (alive, most) == (0, 2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, UserError, "batch_size is 0"),
        ({"batch_size": None}, UserError, "batch_size is None"),
        ({"max_windows": 0}, UserError, "max_windows is 0"),
        ({"max_windows": -1}, UserError, "max_windows is -1"),
        ({"steps": 0}, UserError, "steps is 0"),
        ({"steps": True}, UserError, "steps is True"),
        ({"steps": 1.5}, UserError, "steps is 1.5"),
        ({"steps": 10**30}, UserError, "must be from 1 to 3"),
        ({"region": "Common"}, UserError, "region must be one of observed, common"),
        ({"device": "abacus"}, UserError, "device abacus"),
        ({"split": "moon"}, UserError, "no split 'moon'"),
        ({"scale": math.nan}, UserError, "scale is nan"),
        ({"scale": 0.0}, UserError, "scale is 0"),
        ({"thresholds": (math.nan,)}, ValueError, "thresholds"),
        ({"fss_scales": (0,)}, ValueError, "scales"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_wrong_options_of_an_evaluation_are_named(
    options: dict[str, Any], error: type[Exception], words: str, file: Path
) -> None:
    with pytest.raises(error, match=words):
        evaluate_forecaster(Persistence(4, 3), file, **options)


def test_what_would_be_ignored_is_refused_and_modes_come_back(file: Path) -> None:
    model = loaded(Shift())
    with pytest.raises(UserError, match="a checkpoint knows its own"):
        evaluate_forecaster(model, file, scale=3.0)
    windows = NowcastDataset(file, "test", 4)
    with pytest.raises(UserError, match="is open already"):
        evaluate_forecaster(model, windows, split="train")
    with pytest.raises(TypeError, match="data is a list"):
        evaluate_forecaster(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a Identity"):
        evaluate_forecaster(torch.nn.Identity(), windows)  # type: ignore[arg-type]
    mixed = Persistence(4, 3).train()
    mixed.frozen = torch.nn.BatchNorm2d(1).eval()
    evaluate_forecaster(mixed, windows, **FEW)
    assert (mixed.training, mixed.frozen.training) == (True, False)
