"""Schedules against their closed forms, and the optimisers that follow them."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from spatspark_fast.training.optim import build_optimizer, parameter_groups, set_rates
from spatspark_fast.training.options import OptimOptions
from spatspark_fast.training.schedules import Plan, cosine, make_plan, scaled_lr, warmup_cosine


def plan(**changes: Any) -> Plan:
    options: dict[str, Any] = {
        "batches_per_epoch": 10,
        "epochs": 100,
        "max_steps": None,
        "accumulate": 1,
        "warmup_epochs": 5,
        "windows_per_batch": 128,
        "base_lr": 2e-4,
        "final_lr": 0.001,
        "weight_decay": 0.04,
        "weight_decay_end": 0.2,
    }
    return make_plan(**(options | changes))


def test_learning_rate_follows_sparks_published_formula() -> None:
    peak, warmup, total = 1.0, 50, 1000
    for step in range(total):
        if step < warmup:
            expected = 0.005 * peak + 0.995 * peak * step / warmup
        else:
            ratio = (step - warmup) / (total - 1 - warmup)
            expected = 0.001 * peak + 0.999 * peak * (0.5 + 0.5 * math.cos(math.pi * ratio))
        assert warmup_cosine(step, peak, warmup, total, 0.001) == pytest.approx(expected, rel=1e-12)


def test_weight_decay_follows_sparks_published_formula() -> None:
    made = plan()
    for step in range(made.total_steps):
        ratio = step / (made.total_steps - 1)
        expected = 0.2 + (0.04 - 0.2) * (0.5 + 0.5 * math.cos(math.pi * ratio))
        assert made.wd(step) == pytest.approx(expected, rel=1e-12)


def test_ends_are_exact_and_the_peak_is_reached() -> None:
    made = plan()
    assert made.lr(50) == made.peak_lr == pytest.approx(1e-4)
    assert max(made.lr(step) for step in range(1000)) == made.peak_lr
    assert made.lr(999) == pytest.approx(0.001 * made.peak_lr, rel=1e-12)
    assert (made.wd(0), made.wd(999)) == (pytest.approx(0.04), pytest.approx(0.2))


@pytest.mark.parametrize(("epochs", "expected"), [(1600, 400), (100, 250), (4, 10), (1, 2.5)])
def test_warmup_takes_at_most_a_quarter(epochs: int, expected: float) -> None:
    assert plan(epochs=epochs, warmup_epochs=40).warmup_steps == expected


@pytest.mark.parametrize("total", [1, 2, 3])
def test_tiny_runs_have_finite_positive_rates(total: int) -> None:
    made = plan(batches_per_epoch=1, epochs=total)
    assert all(0 < made.lr(step) <= made.peak_lr for step in range(total))
    assert all(0.04 <= made.wd(step) <= 0.2 for step in range(total))


def test_accumulation_counts_steps_per_epoch_with_a_short_last_one() -> None:
    made = plan(batches_per_epoch=5, accumulate=2, epochs=3)
    assert (made.steps_per_epoch, made.total_steps) == (3, 9)
    assert [made.step_of(position) for position in range(11)] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert made.peak_lr == scaled_lr(2e-4, 256)


def test_max_steps_ends_the_schedules_too() -> None:
    made = plan(max_steps=40)
    assert (made.total_steps, made.epochs) == (40, 4)
    assert made.lr(39) == pytest.approx(0.001 * made.peak_lr)


def test_cosine_stays_at_its_ends() -> None:
    assert [cosine(2.0, 4.0, p) for p in (-1.0, 0.0, 0.5, 1.0, 9.0)] == pytest.approx([2, 2, 3, 4, 4])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.mask_token = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_one_dimensional_parameters_and_mask_tokens_do_not_decay() -> None:
    model = Tiny()
    decayed, plain = parameter_groups(model.named_parameters())
    assert [id(p) for p in decayed["params"]] == [id(model.conv.weight)]
    expected = {id(p) for p in (model.conv.bias, model.norm.weight, model.norm.bias, model.mask_token)}
    assert {id(p) for p in plain["params"]} == expected


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_rates_reach_the_optimiser_and_weights_move_by_them(name: str) -> None:
    model = Tiny()
    optimizer = build_optimizer(model.named_parameters(), OptimOptions(name=name), lr=1.0)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in model.named_parameters()}
    torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum().backward()
    set_rates(optimizer.param_groups, lr=0.0, weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())
    set_rates(optimizer.param_groups, lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
    assert moved == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "mask_token"}
