"""nowcast(): pysteps' way of calling, mm/h in and out, no data stays no data, images of any size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatspark_fast import nowcast, pysteps_method
from spatspark_fast.common.errors import UserError
from spatspark_fast.forecast.predictors import ModelPredictor
from spatspark_fast.forecast.tiling import predict_tiled, tile_starts, tile_weights
from spatspark_fast.models.forecaster import Forecaster
from tests.forecast.forecasts import Shift, loaded, moving_rain, save_checkpoint


def frames(height: int = 40, width: int = 52) -> np.ndarray:
    return moving_rain(1, 4, height, width)[0]


def shifted(newest: np.ndarray, step: int) -> np.ndarray:
    """Move a frame to the right, independently of the model."""
    return np.pad(newest, ((0, 0), (step, 0)), mode="edge")[:, : newest.shape[1]]


def test_rates_come_back_in_mm_per_hour() -> None:
    rates = frames()
    made = nowcast(rates, 3, loaded(Shift(), scale=10.0))
    assert made.shape == (3, 40, 52)
    assert made.dtype == np.float32
    for step in range(3):
        assert np.allclose(made[step], shifted(rates[-1], step + 1), atol=1e-4)


def test_more_steps_go_on_from_the_forecast_and_more_frames_are_not_read() -> None:
    rates = np.concatenate((np.full((5, 40, 52), 7.0, np.float32), frames()))
    made = nowcast(rates, 7, loaded(Shift()))
    for step in range(7):
        assert np.allclose(made[step], shifted(rates[-1], step + 1), atol=1e-4), step


def test_steps_between_frames_are_interpolated() -> None:
    rates = frames()
    whole = nowcast(rates, 3, loaded(Shift()))
    made = nowcast(rates, [0.5, 1, 2.25], loaded(Shift()))
    assert np.allclose(made[0], (rates[-1] + whole[0]) / 2, atol=1e-4)
    assert np.array_equal(made[1], whole[0])
    assert np.allclose(made[2], 0.75 * whole[1] + 0.25 * whole[2], atol=1e-4)


def test_no_data_is_dry_to_the_model_and_nan_where_nothing_was_ever_seen() -> None:
    rates = frames().astype(np.float64)
    rates[:, :6] = np.nan  # outside the range of the radar
    rates[-1, 20:24] = np.nan  # lost in the newest frame only
    made = nowcast(rates, 2, loaded(Shift()))
    assert made.dtype == np.float64
    assert np.isnan(made[:, :6]).all()
    assert np.isfinite(made[:, 6:]).all()
    assert (made[0, 20:24] == 0).all()
    masked = nowcast(np.ma.masked_invalid(rates), 2, loaded(Shift()))
    assert np.array_equal(masked, made, equal_nan=True)
    half = nowcast(rates, [0.5], loaded(Shift()))
    assert np.isfinite(half[:, 6:]).all()


@given(height=st.integers(1, 70), width=st.integers(1, 70), multiple=st.sampled_from([1, 8, 32]))
def test_images_of_any_size(height: int, width: int, multiple: int) -> None:
    rates = np.random.default_rng(height).gamma(0.4, 3.0, (4, height, width)).astype(np.float32)
    made = nowcast(rates, 2, loaded(Shift(multiple=multiple)))
    assert np.allclose(made[1], shifted(rates[-1], 2)[:, :width], atol=1e-3)


class Local(Forecaster):
    """Blur a little: what a tile sees of its surroundings is 1 pixel."""

    def __init__(self) -> None:
        super().__init__(2, 1, multiple=8)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(frames[:, -1:], 3, stride=1, padding=1)


@given(height=st.integers(20, 90), width=st.integers(20, 90), tile=st.sampled_from([16, 24, 32]))
def test_tiles_join_without_a_seam(height: int, width: int, tile: int) -> None:
    model = Local().eval()
    x = torch.rand(2, 2, height, width, generator=torch.Generator().manual_seed(height))
    whole, tiled = model.predict(x), predict_tiled(model, x, tile)
    # A tile knows nothing of what is beyond its edge, but there it hardly counts.
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert (whole - tiled)[inside].abs().max() < 0.35
    assert (whole - tiled)[inside].abs().mean() < 0.02
    constant = predict_tiled(Shift(2, 1).eval(), torch.ones(1, 2, height, width), tile)
    assert torch.allclose(constant, torch.ones(1), atol=1e-6)


@given(length=st.integers(1, 200), tile=st.integers(4, 64))
def test_tiles_cover_everything(length: int, tile: int) -> None:
    starts = tile_starts(length, tile, tile // 4)
    covered = np.zeros(length)
    for start in starts:
        assert start >= 0
        assert start + tile <= length or starts == [0]
        covered[start : start + tile] += 1
    assert covered.min() >= 1
    assert (tile_weights(tile, tile // 4) > 0).all()


def test_pysteps_calling_convention(tmp_path: Path) -> None:
    rates = frames(64, 64)
    method = pysteps_method(loaded(Shift()))
    assert np.array_equal(method(rates, np.zeros((2, 64, 64)), 3), nowcast(rates, 3, loaded(Shift())))
    checkpoint = save_checkpoint(tmp_path / "m.ckpt", lengths=(4, 3))
    by_path = nowcast(rates, 2, checkpoint)
    assert by_path.shape == (2, 64, 64)
    assert np.array_equal(pysteps_method(str(checkpoint))(rates, None, timesteps=2), by_path)
    assert np.array_equal(nowcast(rates, 2, ModelPredictor(loaded(Shift()))), nowcast(rates, 2, loaded(Shift())))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rates: rates[:3], "T of at least 4"),
        (lambda rates: rates[0], "T of at least 4"),
        (lambda rates: rates - 15.0, "not in dB"),
        (lambda rates: rates + np.inf, "infinite"),
        (lambda rates: rates[:, :0], "T of at least 4"),
        (lambda rates: rates[:0], "T of at least 4"),
        (lambda rates: rates[None], "T of at least 4"),
        (lambda rates: rates - np.inf, "infinite"),
        (lambda rates: rates + 2e6, "beyond any rain"),
        (lambda rates: rates.astype("f8") + 1e300, "beyond any rain"),
        (lambda rates: rates.astype(complex), "no array of numbers"),
        (lambda rates: rates.astype(str), "no array of numbers"),
        (lambda rates: rates.astype(object), "no array of numbers"),
        (lambda rates: rates.astype("M8[s]"), "no array of numbers"),
        (lambda rates: [rates[0], rates[1, :3]], "no array of numbers"),
        (lambda rates: None, "no array of numbers"),
        (lambda rates: "rain.h5", "no array of numbers"),
        (lambda rates: torch.from_numpy(rates).requires_grad_(), "no array of numbers"),
    ],
)
def test_wrong_frames(change, word: str) -> None:
    with pytest.raises(UserError, match=word):
        nowcast(change(frames()), 2, loaded(Shift()))


NO_STEPS = [
    *(0, -1, -(10**30), [], [2, 1], [1, 1], [0.0, 1.0], [-1.0, 2.0], [1, float("nan")], [float("inf")], float("nan")),
    *(
        3.0,
        True,
        [True],
        "3",
        ["1", "2"],
        None,
        1j,
        [1j],
        [[1, 2]],
        [[1], [1, 2]],
        {"a": 1},
        Ellipsis,
        np.zeros((0, 2)),
    ),
    *(np.float32(3), np.bool_(True), np.array([[1.0]]), np.datetime64("2020-01-01"), b"3"),
]
TOO_FAR = [10**9, [1e9], [1, 1e300], 4097, [0.5, 4096.5], 10**30, 2**31, 2**63, 2**64, np.uint64(2**63), [10**400]]


@pytest.mark.parametrize("steps", [*NO_STEPS, *TOO_FAR], ids=lambda steps: repr(steps)[:30])
def test_wrong_steps(steps) -> None:
    with pytest.raises(
        UserError, match=r"timesteps .{1,90} (must be|go .* steps of 5 minutes ahead: give at most 4096)"
    ):
        nowcast(frames(), steps, loaded(Shift()))


@pytest.mark.parametrize(
    ("steps", "plain"),
    [
        (np.int64(2), 2),
        (np.array(2), 2),
        (np.uint8(2), 2),
        (range(1, 3), 2),
        ((1, 2), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (np.array([0.5], np.float16), [0.5]),
        (torch.tensor([1, 2]), [1, 2]),
    ],
)
def test_steps_of_all_kinds(steps, plain) -> None:
    assert np.array_equal(nowcast(frames(), steps, loaded(Shift())), nowcast(frames(), plain, loaded(Shift())))


@pytest.mark.parametrize(
    "change",
    [
        lambda rates: np.asfortranarray(rates),
        lambda rates: np.ascontiguousarray(rates[::-1])[::-1],
        lambda rates: rates.astype(">f4"),
        lambda rates: rates.tolist(),
        lambda rates: torch.from_numpy(rates),
        lambda rates: np.repeat(rates, 2, axis=2)[:, :, ::2],
        lambda rates: np.ma.array(rates),
    ],
)
def test_frames_may_lie_in_memory_as_they_like(change) -> None:
    assert np.array_equal(nowcast(change(frames()), 2, loaded(Shift())), nowcast(frames(), 2, loaded(Shift())))


def test_frames_without_data_and_of_one_pixel() -> None:
    nothing = np.full((4, 3, 5), np.nan)
    assert np.isnan(nowcast(nothing, 2, loaded(Shift()))).all()
    one = nowcast(np.full((4, 1, 1), 2, np.int64), [0.5, 2], loaded(Shift(multiple=8)))
    assert one.dtype == np.float32
    assert np.allclose(one, 2)


def test_wrong_tile_file_model_and_device(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        nowcast(frames(), 1, loaded(Shift()), tile=12)
    (tmp_path / "no.ckpt").write_bytes(b"no checkpoint")
    checkpoint = save_checkpoint(tmp_path / "m.ckpt", lengths=(4, 3))
    for call in (lambda *a, **k: nowcast(frames(), 1, *a, **k), pysteps_method):
        with pytest.raises(UserError, match=r"no\.ckpt"):
            call(tmp_path / "no.ckpt")
        with pytest.raises(UserError, match="device abacus cannot be used"):
            call(checkpoint, device="abacus")
        with pytest.raises(UserError, match="device is cpu, but the model is loaded"):
            call(loaded(Shift()), device="cpu")
        for model in (None, 3, Shift(), torch.nn.Identity()):
            with pytest.raises(TypeError, match="model is a"):
                call(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tiles is no option"):
        pysteps_method(checkpoint, tiles=64)


def test_the_tile_of_a_predictor_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def spied(model: Forecaster, x: torch.Tensor, tile: int | None) -> torch.Tensor:
        seen.append(tile)
        return predict_tiled(model, x, tile)

    monkeypatch.setattr("spatspark_fast.forecast.predictors.predict_tiled", spied)
    predictor = ModelPredictor(loaded(Shift(multiple=8)), tile=16)
    nowcast(frames(), 1, predictor)
    nowcast(frames(), 1, predictor, tile=24)
    pysteps_method(predictor)(frames(), None, 1)
    pysteps_method(predictor, tile=32)(frames(), None, 1)
    assert seen == [16, 24, 16, 32]


LIGHT = """
import sys, spatspark_fast
heavy = {"torch", "numpy", "matplotlib", "xarray"} & set(sys.modules)
assert not heavy, heavy
"""
NO_MORE_THAN_TORCH = """
import sys
from spatspark_fast import nowcast
assert "torch" in sys.modules and "matplotlib" not in sys.modules
assert "patchsparse.backends.triton" not in sys.modules and "MinkowskiEngine" not in sys.modules
"""


@pytest.mark.parametrize("code", [LIGHT, pytest.param(NO_MORE_THAN_TORCH, marks=pytest.mark.rest)])
def test_importing_the_package_is_light(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
