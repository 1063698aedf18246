"""SparK on packed patches equals an independent dense-masked SparK, in one step and in training."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, pack
from spatspark_fast.models.spark import SparK, SparKOutput

from ..matrix import rest_but
from .parity import Case, Pair, gradients, make_frames, make_pair, relative_error, unequal_grid
from .reference_spark import ReferenceOutput, ReferenceSparK

RESNET18 = Case("resnet18", "unet", "masked")
RESNET50 = Case("resnet50", "unet", "all")
CONVNEXT = Case("convnext_tiny", "unet", "masked")
RESNET18_LIGHT = Case("resnet18", "light", "all")
CONVNEXT_LIGHT = Case("convnext_tiny", "light", "masked")
RESNET18_16 = Case("resnet18", "unet", "masked", patch=16, levels=3)
CONVNEXT_16 = Case("convnext_atto", "light", "masked", patch=16, levels=3)
EXACT = 1e-9

every_backend = pytest.mark.parametrize("backend", ["gather", "dense"])


def name_of(value: Case | str) -> str:
    return "-".join(map(str, value)) if isinstance(value, Case) else value


def run_both(pair: Pair, frames: Tensor, grid: PatchGrid) -> tuple[SparKOutput, ReferenceOutput]:
    ours, reference = pair.ours(frames, grid), pair.reference(frames, grid.active)
    ours.loss.backward()
    reference.loss.backward()
    return ours, reference


def check_everything(pair: Pair, frames: Tensor, grid: PatchGrid) -> None:
    features: list[Tensor] = []
    pair.ours.densify.register_forward_pre_hook(lambda _, arguments: features.extend(arguments[0]))
    ours, reference = run_both(pair, frames, grid)
    for feature, dense in zip(features, reference.features, strict=True):
        assert relative_error(feature.detach(), pack(dense.detach(), grid)) < EXACT
    assert relative_error(ours.loss.detach(), reference.loss.detach()) < EXACT
    assert relative_error(ours.prediction.detach(), reference.prediction.detach()) < EXACT
    expected = dict(pair.reference.state_dict())
    for name, value in pair.ours.state_dict().items():
        if "running" in name or "tracked" in name:
            assert relative_error(value.double(), expected[name].double()) < EXACT, name
    theirs = dict(gradients(pair.reference))
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 0
    for name, gradient in gradients(pair.ours):
        # A gradient that is 0 in exact arithmetic is rounding noise on both sides; measure it against the
        # largest one.
        assert relative_error(gradient, theirs[name], floor=1e-6 * largest) < EXACT, name


@pytest.mark.parametrize(
    ("case", "backend"),
    rest_but(
        [(RESNET18, "gather"), (RESNET18_LIGHT, "gather"), (RESNET50, "gather"), (CONVNEXT_LIGHT, "dense")],
        [
            (RESNET18, "gather"),
            (RESNET18, "dense"),
            (RESNET18_LIGHT, "gather"),
            (RESNET50, "gather"),
            (RESNET50, "dense"),
            (CONVNEXT, "gather"),
            (CONVNEXT_LIGHT, "dense"),
        ],
    ),
    ids=name_of,
)
def test_features_loss_statistics_and_every_gradient(case: Case, backend: str) -> None:
    check_everything(make_pair(case, backend), make_frames(4, 64, 96), unequal_grid())


@pytest.mark.parametrize(
    ("case", "size", "backend"),
    [
        (Case("resnet18", "unet", "masked", patch=64), (128, 192), "gather"),
        (Case("resnet18", "unet", "masked", patch=16, levels=3), (32, 48), "gather"),
        (Case("resnet18", "unet", "masked", patch=16, levels=3), (32, 48), "dense"),
        (Case("convnext_tiny", "light", "masked", patch=8, levels=2), (16, 24), "gather"),
        (Case("convnext_tiny", "light", "masked", patch=8, levels=2), (16, 24), "dense"),
    ],
    ids=lambda value: str(value.patch) if isinstance(value, Case) else str(value),
)
def test_other_patch_sizes(case: Case, size: tuple[int, int], backend: str) -> None:
    check_everything(make_pair(case, backend), make_frames(4, *size), unequal_grid())


@every_backend
def test_evaluation_mode(backend: str) -> None:
    pair = make_pair(RESNET18, backend)
    pair.ours.eval()
    pair.reference.eval()
    check_everything(pair, make_frames(4, 64, 96), unequal_grid())


@pytest.mark.parametrize(
    ("case", "optimiser", "backend"),
    rest_but(
        [(RESNET18_16, "sgd", "gather"), (CONVNEXT_16, "adamw", "gather")],
        [
            (RESNET18, "sgd", "gather"),
            (RESNET18_16, "sgd", "gather"),
            (RESNET18_16, "adamw", "dense"),
            (Case("resnet50", "unet", "all", patch=16, levels=3), "sgd", "gather"),
            (CONVNEXT_16, "adamw", "gather"),
            (Case("convnext_tiny", "unet", "masked", patch=8, levels=2), "sgd", "dense"),
        ],
    ),
    ids=name_of,
)
def test_twenty_training_steps_stay_together(case: Case, optimiser: str, backend: str) -> None:
    pair = make_pair(case, backend)
    losses = train(case, optimiser, pair.ours, pair.reference)
    for step, (ours, reference) in enumerate(losses):
        assert abs(ours - reference) < EXACT * reference, step
    assert sum(ours for ours, _ in losses[-4:]) < sum(ours for ours, _ in losses[:4])
    expected = pair.reference.state_dict()
    for name, value in pair.ours.state_dict().items():
        assert relative_error(value.double(), expected[name].double()) < EXACT, name


def train(case: Case, optimiser: str, *models: nn.Module) -> list[list[float]]:
    """Train the models side by side for 20 steps on four batches, and return their losses of each step."""
    optimisers = [make_optimiser(model, optimiser) for model in models]
    generator = torch.Generator().manual_seed(3)
    losses: list[list[float]] = []
    for step in range(20):
        grid = PatchGrid.random(4, (2, 2), keep=2, generator=generator)
        frames = make_frames(4, 2 * case.patch, 2 * case.patch, seed=step % 4)
        losses.append([])
        for model, each in zip(models, optimisers, strict=True):
            loss = run(model, frames, grid).loss
            loss.backward()
            each.step()
            each.zero_grad()
            losses[-1].append(loss.item())
    return losses


def run(model: nn.Module, frames: Tensor, grid: PatchGrid) -> SparKOutput | ReferenceOutput:
    frames = frames.to(next(model.parameters()).dtype)
    if isinstance(model, ReferenceSparK):
        return model(frames.contiguous(memory_format=torch.channels_last), grid.active)
    return model(frames, grid)


def make_optimiser(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    # Adam divides a gradient by its own size, so it turns the rounding noise of a gradient that is exactly 0
    # into a step of full size; an eps above that noise (1e-16) leaves such a parameter where it is.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)


class Single(NamedTuple):
    """The float64 truth, and both models in float32."""

    truth: ReferenceSparK
    ours: SparK
    reference: ReferenceSparK


def make_single(case: Case, backend: str) -> Single:
    """Build the models for a comparison of rounding errors.

    Two things that are not rounding errors of our operations are made equal. ReLU becomes SiLU: one sign that
    flips near 0 changes a gradient by thousands of roundings, on either side, by luck. The reference runs in
    channels_last too, because PyTorch's batch norm sums in another order, less exactly, in that layout.
    """
    truth = make_pair(case, backend).reference
    pair = make_pair(case, backend, torch.float32)
    models = Single(truth, pair.ours, pair.reference.to(memory_format=torch.channels_last))
    for model in models:
        smooth(model)
    return models


def smooth(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.ReLU | nn.LeakyReLU):
            setattr(module, name, nn.SiLU())
        smooth(child)


@pytest.mark.parametrize(
    ("case", "backend"),
    rest_but(
        [(RESNET18, "gather")],
        [(RESNET18, "gather"), (RESNET18, "dense"), (RESNET50, "gather"), (CONVNEXT_LIGHT, "gather")],
    ),
    ids=name_of,
)
def test_float32_is_as_exact_as_dense_and_mask(case: Case, backend: str) -> None:
    """Our distance to the float64 truth is at most twice that of dense-and-mask, overall and at worst."""
    models = make_single(case, backend)
    outputs = [run(model, make_frames(4, 64, 96), unequal_grid()) for model in models]
    for output in outputs:
        output.loss.backward()
    truth, ours, reference = (output.prediction.detach().double() for output in outputs)
    assert (ours - truth).norm() <= 2 * (reference - truth).norm()
    exact, ours_all, reference_all = (dict(gradients(model)) for model in models)
    # A gradient that is 0 in exact arithmetic has no relative error; it counts in units of larger ones.
    floor = 1e-4 * max(gradient.norm().item() for gradient in exact.values())
    errors = {
        name: [
            (gradient[name].double() - value).norm().item() / max(value.norm().item(), floor)
            for gradient in (ours_all, reference_all)
        ]
        for name, value in exact.items()
    }
    ours_errors, reference_errors = (sorted(pair[side] for pair in errors.values()) for side in (0, 1))
    middle = len(errors) // 2
    assert ours_errors[middle] <= 2 * reference_errors[middle], errors
    assert ours_errors[-1] <= 2 * reference_errors[-1], errors


def test_float32_training_drifts_no_further_than_dense_and_mask() -> None:
    case = Case("resnet18", "light", "masked", patch=16, levels=3)
    models = make_single(case, "gather")
    train(case, "sgd", *models)
    truth, ours, reference = (model.state_dict() for model in models)

    def distance(state: dict[str, Tensor]) -> float:
        return sum((state[key].double() - truth[key].double()).square().sum().item() for key in truth) ** 0.5

    assert distance(ours) <= 2 * distance(reference)
