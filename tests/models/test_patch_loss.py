"""The patch loss: cutting, normalisation, which patches count, and windows where nothing happens."""

from __future__ import annotations

import pytest
import torch

from patchsparse import PatchGrid
from spatspark_fast.models.choices import LossOn
from spatspark_fast.models.patch_loss import (
    denormalise_patches,
    normalise_patches,
    patch_errors,
    patch_statistics,
    patchify,
    reconstruction_loss,
    unpatchify,
)


def frames_of(batch: int = 2, chans: int = 3, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(batch, chans, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_patchify_cuts_and_unpatchify_restores() -> None:
    frames = frames_of()
    patches = patchify(frames, (2, 3))
    assert patches.shape == (2, 2, 3, 3, 4, 4)
    assert torch.equal(patches[1, 1, 2], frames[1, :, 4:8, 8:12])
    assert torch.equal(unpatchify(patches), frames)


def test_statistics_are_those_of_pixels_and_frames() -> None:
    frames = frames_of()
    statistics = patch_statistics(frames, (2, 3))
    patch = frames[1, :, 4:8, 8:12]
    torch.testing.assert_close(statistics.mean[1, 0, 1, 0, 2, 0], patch.mean(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(statistics.std[1, 0, 1, 0, 2, 0], (patch.var(unbiased=True) + 1e-6).sqrt())


def test_denormalise_inverts_normalise() -> None:
    frames = frames_of()
    statistics = patch_statistics(frames, (2, 3))
    normal = normalise_patches(frames, statistics)
    assert patchify(normal, (2, 3)).mean(dim=(3, 4, 5)).abs().max() < 1e-14
    torch.testing.assert_close(denormalise_patches(normal, statistics), frames, rtol=1e-13, atol=1e-13)


def test_masked_loss_reads_masked_patches_only() -> None:
    frames = frames_of()
    active = torch.zeros(2, 2, 3, dtype=torch.bool)
    active[0, 0, 0] = active[1, 1, :] = True
    grid = PatchGrid.from_active(active)
    prediction = frames_of(2) * 0.5
    prediction.requires_grad_()
    loss = reconstruction_loss(prediction, frames, grid, "masked")
    errors = patch_errors(prediction, frames, (2, 3))
    torch.testing.assert_close(loss, errors[~active].mean())
    loss.backward()
    assert prediction.grad is not None
    touched = patchify(prediction.grad, (2, 3)).abs().amax(dim=(3, 4, 5)) > 0
    assert torch.equal(touched, ~active)


def test_all_loss_is_the_sum_over_patches_per_window() -> None:
    frames, prediction = frames_of(), torch.zeros(2, 3, 8, 12, dtype=torch.float64)
    grid = PatchGrid.random(2, (2, 3), keep=2)
    # A patch of n values normalised by its unbiased variance has mean square (n - 1) / n.
    expected = 6 * 47 / 48
    assert reconstruction_loss(prediction, frames, grid, "all").item() == pytest.approx(expected, rel=1e-5)


def test_without_norm_the_target_is_the_frames() -> None:
    frames = frames_of()
    grid = PatchGrid.random(2, (2, 3), keep=2)
    assert reconstruction_loss(frames, frames, grid, norm=False) == 0
    shifted = reconstruction_loss(frames + 2, frames, grid, norm=False)
    assert shifted.item() == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_dry_window_is_finite(loss_on: LossOn, dtype: torch.dtype) -> None:
    frames = torch.zeros(2, 3, 8, 12)
    prediction = torch.full(frames.shape, 0.5, dtype=dtype, requires_grad=True)
    loss = reconstruction_loss(prediction, frames, PatchGrid.random(2, (2, 3), keep=2), loss_on)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25 if loss_on == "masked" else 1.5)
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_nothing_masked_gives_zero_with_zero_gradients() -> None:
    frames = frames_of()
    prediction = torch.ones_like(frames, requires_grad=True)
    loss = reconstruction_loss(prediction, frames, PatchGrid.random(2, (2, 3), keep=6))
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert prediction.grad.abs().max() == 0


def test_wrong_input_is_named() -> None:
    frames, grid = frames_of(), PatchGrid.random(2, (2, 3), keep=2)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 11\).*divisible by the grid \(2, 3\)"):
        reconstruction_loss(frames[..., :11], frames[..., :11], grid)
    with pytest.raises(ValueError, match="one shape"):
        reconstruction_loss(frames[:1], frames, grid)
    with pytest.raises(ValueError, match="'both'"):
        reconstruction_loss(frames, frames, grid, "both")  # type: ignore[arg-type]
