"""Masks: how many, which, and the same ones again after a resume."""

from __future__ import annotations

import math

import pytest
import torch

from spatspark_fast.common.errors import UserError
from spatspark_fast.models.choices import MaskSchedule
from spatspark_fast.models.masks import MaskSampler, num_visible, wet_share

FRAMES = torch.zeros(4, 12, 288, 288)


def half_wet(batch: int) -> torch.Tensor:
    """Return windows of 4x4 patches of 8 pixels: the left half is rain, the right half dry."""
    frames = torch.zeros(batch, 2, 32, 32)
    frames[..., :16] = 0.3
    return frames


@pytest.mark.parametrize(("ratio", "visible"), [(0.6, 32), (0.3, 57), (0.0, 81), (0.999, 1), (0.75, 20)])
def test_visible_counts(ratio: float, visible: int) -> None:
    assert num_visible(81, ratio) == visible
    grid = MaskSampler(ratio)(FRAMES, step=0)
    assert grid.shape == (9, 9)
    assert grid.counts().tolist() == [visible] * 4


def test_masks_repeat_by_step_and_differ_between_steps_ranks_and_seeds() -> None:
    sampler = MaskSampler(0.6, seed=5)
    first = sampler(FRAMES, step=7, rank=1).active
    assert torch.equal(first, MaskSampler(0.6, seed=5)(FRAMES, step=7, rank=1).active)
    others = [
        sampler(FRAMES, step=8, rank=1),
        sampler(FRAMES, step=7, rank=0),
        sampler(FRAMES, step=1, rank=7),
        MaskSampler(0.6, seed=6)(FRAMES, step=7, rank=1),
    ]
    for other in others:
        assert not torch.equal(first, other.active)
    assert not torch.equal(first[0], first[1])


def test_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    MaskSampler(0.3, 0.6, "interval", "rain")(FRAMES, step=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_strategy_is_uniform() -> None:
    frames = torch.zeros(4000, 1, 4, 4)
    active = MaskSampler(0.75, patch=1)(frames, step=0).active
    share = active.float().mean(0)
    # Binomial with p = 0.25 and 4000 draws: five standard deviations are 0.034.
    assert (share - 0.25).abs().max() < 0.034


def test_rain_strategy_masks_wet_patches_more_often() -> None:
    frames = half_wet(2000)
    masked = ~MaskSampler(0.5, strategy="rain", strength=3.0, patch=8)(frames, step=0).active
    wet, dry = masked[..., :2].float().mean(), masked[..., 2:].float().mean()
    assert wet > 0.85
    assert wet + dry == pytest.approx(1.0)


def test_rain_follows_the_stated_odds() -> None:
    """With one patch masked, a wet one is exp(strength) times as likely to be it as a dry one."""
    frames = half_wet(20000)
    masked = ~MaskSampler(1 / 16, strategy="rain", strength=1.0, patch=8)(frames, step=0).active
    wet, dry = masked[..., :2].sum().item(), masked[..., 2:].sum().item()
    assert wet + dry == 20000
    assert wet / dry == pytest.approx(math.e, rel=0.1)


def test_rain_without_strength_or_contrast_is_random() -> None:
    random = MaskSampler(0.5, patch=8)(half_wet(4), step=2).active
    assert torch.equal(MaskSampler(0.5, strategy="rain", strength=0.0, patch=8)(half_wet(4), step=2).active, random)
    dry = torch.zeros(4, 2, 32, 32)
    assert torch.equal(MaskSampler(0.5, strategy="rain", patch=8)(dry, step=2).active, random)


def test_wet_share() -> None:
    frames = torch.zeros(1, 2, 8, 8)
    frames[0, 0, :4, :2] = 0.5
    assert wet_share(frames, (2, 2)).tolist() == [[[0.25, 0.0], [0.0, 0.0]]]
    assert wet_share(frames, (2, 2), threshold=0.5).sum() == 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", (0.6, 0.6, 0.6)), ("linear", (0.6, 0.45, 0.3)), ("cosine", (0.6, 0.556066, 0.3))],
)
def test_schedules(schedule: MaskSchedule, expected: tuple[float, float, float]) -> None:
    sampler = MaskSampler(0.6, None if schedule == "constant" else 0.3, schedule)
    progress = (0.0, 0.5 if schedule == "linear" else 0.25, 1.0)
    for at, ratio in zip(progress, expected, strict=True):
        assert sampler.ratio_at(at) == pytest.approx(ratio if schedule != "constant" else 0.6, abs=1e-6)


def test_schedule_reaches_the_masks() -> None:
    sampler = MaskSampler(0.8, 0.2, "linear")
    counts = [int(sampler(FRAMES, step=0, progress=at).counts()[0]) for at in (0.0, 0.5, 1.0)]
    assert counts == [round(81 * 0.2), round(81 * 0.5), round(81 * 0.8)]


def test_interval_is_uniform_and_shared_by_ranks() -> None:
    sampler = MaskSampler(0.2, 0.8, "interval", seed=1)
    ratios = torch.tensor([sampler.ratio_at(0.0, step) for step in range(2000)])
    assert 0.2 <= ratios.min() < 0.21
    assert 0.79 < ratios.max() <= 0.8
    assert ratios.mean().item() == pytest.approx(0.5, abs=0.02)
    counts = {int(sampler(FRAMES, step=9, rank=rank).counts()[0]) for rank in range(4)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"mask\.ratio is"),
        ({"ratio": -0.1}, r"mask\.ratio is"),
        ({"ratio": math.nan}, r"mask\.ratio is"),
        ({"schedule": "linear"}, "ratio_end"),
        ({"ratio_end": 0.2}, "schedule"),
        ({"schedule": "sine", "ratio_end": 0.2}, "'sine'"),
        ({"schedule": "interval", "ratio": 0.6, "ratio_end": 0.2}, "ratio <= ratio_end"),
        ({"strategy": "blocks"}, "'blocks'"),
        ({"strength": -1.0}, "strength"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskSampler(**arguments)  # type: ignore[arg-type]


def test_image_that_patches_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"280 x 300 pixels.*patches of 32.*256 x 288 or 288 x 320"):
        MaskSampler()(torch.zeros(1, 2, 280, 300), step=0)
