"""SparK on packed patches equals an independent dense-masked SparK, in one step and in training."""

from __future__ import annotations

import pytest
import torch
from parity import Case, Pair, gradients, make_frames, make_pair, relative_error, unequal_grid
from reference_spark import ReferenceOutput
from torch import Tensor

from patchsparse import PatchGrid, pack
from spatspark_fast.models.spark import SparKOutput

CASES = [
    Case("resnet18", "unet", "masked"),
    Case("resnet18", "light", "all"),
    Case("resnet50", "unet", "all"),
    Case("convnext_tiny", "unet", "masked"),
    Case("convnext_tiny", "light", "masked"),
]
BACKENDS = ["gather", "dense"]
EXACT = 1e-9

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def run_both(pair: Pair, frames: Tensor, grid: PatchGrid) -> tuple[SparKOutput, ReferenceOutput]:
    ours, reference = pair.ours(frames, grid), pair.reference(frames, grid.active)
    ours.loss.backward()
    reference.loss.backward()
    return ours, reference


def check_everything(pair: Pair, frames: Tensor, grid: PatchGrid) -> None:
    ours, reference = run_both(pair, frames, grid)
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


@every_backend
@every_case
def test_loss_statistics_and_every_gradient(case: Case, backend: str) -> None:
    check_everything(make_pair(case, backend), make_frames(4, 64, 96), unequal_grid())


@every_backend
@pytest.mark.parametrize("encoder", ["resnet18", "resnet50", "convnext_tiny"])
def test_features(encoder: str, backend: str) -> None:
    pair = make_pair(Case(encoder, "light", "masked"), backend)
    frames, grid = make_frames(4, 64, 96), unequal_grid()
    with torch.no_grad():
        ours = pair.ours.encode(pack(frames, grid), grid)
        reference = pair.reference(frames, grid.active).features
    assert [tuple(feature.shape[2:]) for feature in ours] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    for feature, dense in zip(ours, reference, strict=True):
        assert relative_error(feature, pack(dense, grid)) < EXACT


@every_backend
@pytest.mark.parametrize(
    ("case", "size"),
    [
        (Case("resnet18", "unet", "masked", patch=64), (128, 192)),
        (Case("resnet18", "unet", "masked", patch=16, levels=3), (32, 48)),
        (Case("convnext_tiny", "light", "masked", patch=8, levels=2), (16, 24)),
    ],
    ids=["patch64", "patch16", "patch8"],
)
def test_other_patch_sizes(case: Case, size: tuple[int, int], backend: str) -> None:
    check_everything(make_pair(case, backend), make_frames(4, *size), unequal_grid())


@every_backend
def test_evaluation_mode(backend: str) -> None:
    pair = make_pair(CASES[0], backend)
    pair.ours.eval()
    pair.reference.eval()
    check_everything(pair, make_frames(4, 64, 96), unequal_grid())


@every_backend
@pytest.mark.parametrize(
    ("case", "optimiser"),
    [(CASES[0], "sgd"), (CASES[1], "adamw"), (CASES[2], "sgd"), (CASES[3], "adamw")],
    ids=lambda value: value if isinstance(value, str) else value.encoder,
)
def test_twenty_training_steps_stay_together(case: Case, optimiser: str, backend: str) -> None:
    pair = make_pair(case, backend)
    optimisers = [make_optimiser(model, optimiser) for model in pair]
    generator = torch.Generator().manual_seed(3)
    losses: list[float] = []
    for step in range(20):
        frames = make_frames(4, 64, 64, seed=step % 4)
        grid = PatchGrid.random(4, (2, 2), keep=2, generator=generator)
        ours, reference = run_both(pair, frames, grid)
        assert relative_error(ours.loss.detach(), reference.loss.detach()) < EXACT, step
        losses.append(ours.loss.item())
        for each in optimisers:
            each.step()
            each.zero_grad()
    assert sum(losses[-4:]) < sum(losses[:4])
    expected = pair.reference.state_dict()
    for name, value in pair.ours.state_dict().items():
        assert relative_error(value.double(), expected[name].double()) < EXACT, name


def make_optimiser(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    # Adam divides a gradient by its own size, so it turns the rounding noise of a gradient that is exactly 0
    # into a step of full size; an eps above that noise (1e-16) and below true gradients leaves those
    # parameters where they are.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)


@every_backend
@every_case
def test_float32_is_as_exact_as_pytorch(case: Case, backend: str) -> None:
    """Ours in float32 is at most twice as far from the float64 truth as dense-and-mask in float32 is."""
    frames, grid = make_frames(4, 64, 96), unequal_grid()
    truth = make_pair(case, backend).reference
    truth(frames, grid.active).loss.backward()
    pair = make_pair(case, backend, torch.float32)
    run_both(pair, frames.float(), grid)
    exact = dict(gradients(truth))
    theirs = dict(gradients(pair.reference))
    largest = max(gradient.norm().item() for gradient in exact.values())
    for name, gradient in gradients(pair.ours):
        scale = max(exact[name].norm().item(), 1e-4 * largest)
        ours_off = (gradient.double() - exact[name]).norm().item() / scale
        theirs_off = (theirs[name].double() - exact[name]).norm().item() / scale
        assert ours_off <= 2 * theirs_off + 1e-6, f"{name}: {ours_off:.1e} against {theirs_off:.1e}"
