"""Score a reconstruction patch by patch: the objective of masked image modelling.

Frames ``(B, T, H, W)`` are cut by the grid ``(Gh, Gw)`` into patches of ``H/Gh x W/Gw`` pixels and ``T``
frames. A patch is normalised by its own mean and variance, so that the loss asks for structure and not for
how hard it rains.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchsparse import PatchGrid
from spatspark_fast.models.choices import LossOn
from spatspark_fast.models.region import Region, crop

__all__ = [
    "PatchStatistics",
    "contrast",
    "decoded_loss",
    "denormalise_patches",
    "normalise_patches",
    "patch_errors",
    "patch_means",
    "patch_statistics",
    "patchify",
    "reconstruction_loss",
    "region_loss",
    "unpatchify",
]

# Keeps the target of a patch without any contrast (a dry one) finite: its normalised pixels are exactly 0.
VARIANCE_FLOOR = 1e-6


class PatchStatistics(NamedTuple):
    """Hold mean and standard deviation of each patch, both ``(B, 1, Gh, 1, Gw, 1)`` in data units."""

    mean: Tensor
    std: Tensor


def patchify(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """View ``(B, T, H, W)`` as the patches ``(B, Gh, Gw, T, ph, pw)`` of a grid of ``shape`` (Gh, Gw).

    Equivalent to::

        frames.unflatten(3, (Gw, pw)).unflatten(2, (Gh, ph)).permute(0, 2, 4, 1, 3, 5)

    Raises ValueError if the grid does not divide the frames.
    """
    return _split(frames, shape).permute(0, 2, 4, 1, 3, 5)


def unpatchify(patches: Tensor) -> Tensor:
    """Put patches ``(B, Gh, Gw, T, ph, pw)`` together into ``(B, T, Gh*ph, Gw*pw)``; undoes `patchify`."""
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patch_statistics(frames: Tensor, shape: tuple[int, int]) -> PatchStatistics:
    """Measure mean and unbiased variance of the patches of ``(B, T, H, W)`` over their pixels and frames.

    The standard deviation is the root of the variance plus 1e-6: 0.001 and not 0 in a dry patch.
    """
    variance, mean = torch.var_mean(_split(frames, shape), dim=(1, 3, 5), keepdim=True)
    return PatchStatistics(mean, (variance + VARIANCE_FLOOR).sqrt())


def patch_means(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the mean of each patch of ``(B, T, H, W)`` over its pixels and frames, ``(B, Gh, Gw)``."""
    return patchify(frames.mean(dim=1, keepdim=True), shape).mean(dim=(3, 4, 5))


def contrast(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the error that each patch's mean would leave, ``(B, Gh, Gw)`` from 0 (dry) to nearly 1 (rain).

    It is the mean square of the normalised pixels: of a variance v, ``v / (v + 1e-6)``. By the mean of squares, which
    is quick and less exact than `patch_statistics`.
    """
    mean, square = patch_means(frames, shape), patch_means(frames.square(), shape)
    variance = (square - mean.square()).clamp(min=0)
    return variance / (variance + VARIANCE_FLOOR)


def normalise_patches(frames: Tensor, statistics: PatchStatistics) -> Tensor:
    """Scale each patch of ``(B, T, H, W)`` to mean 0 and variance 1 by its ``statistics``."""
    patches = _split(frames, _shape_of(statistics))
    return ((patches - statistics.mean) / statistics.std).reshape(frames.shape)


def denormalise_patches(frames: Tensor, statistics: PatchStatistics) -> Tensor:
    """Bring ``(B, T, H, W)`` from patch-normalised back to data units; inverse of `normalise_patches`."""
    patches = _split(frames, _shape_of(statistics))
    return (patches * statistics.std + statistics.mean).reshape(frames.shape)


def patch_errors(prediction: Tensor, frames: Tensor, shape: tuple[int, int], norm: bool = True) -> Tensor:
    """Return the mean squared error of each patch, ``(B, Gh, Gw)`` float32 (float64 for float64 frames).

    ``prediction`` and ``frames`` are ``(B, T, H, W)``; with ``norm`` the prediction is in patch-normalised
    units and the frames (data units) are normalised here. Equivalent to::

        target = normalise_patches(frames, patch_statistics(frames, shape))
        errors = patchify(prediction - target, shape).square().mean((3, 4, 5))

    Raises ValueError if the shapes differ or the grid does not divide them.
    """
    if prediction.shape != frames.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and frames {tuple(frames.shape)} must have one shape")
    frames = frames if frames.dtype == torch.float64 else frames.float()
    target = normalise_patches(frames, patch_statistics(frames, shape)) if norm else frames
    squares = (prediction.to(target.dtype) - target).square()
    return _split(squares, shape).mean(dim=(1, 3, 5))


def reconstruction_loss(
    prediction: Tensor, frames: Tensor, grid: PatchGrid, loss_on: LossOn = "masked", norm: bool = True
) -> Tensor:
    """Return the scalar loss of a ``prediction`` of ``frames``, both ``(B, T, H, W)``, seen through ``grid``.

    ``loss_on="masked"`` (SparK) is the mean error of the patches that the encoder did not see; it is 0, with
    zero gradients, when nothing is masked, so that a schedule may end at ratio 0 and no rank of a distributed
    run has to skip a step. ``loss_on="all"`` (the published code of SpaT-SparK) is the sum over all patches
    divided by ``B``, about ``Gh*Gw`` times larger. No value is read back from the device.
    """
    errors = patch_errors(prediction, frames, grid.shape, norm)
    return _mean_error(errors, grid.active, loss_on, grid.shape)


def region_loss(
    prediction: Tensor, frames: Tensor, grid: PatchGrid, region: Region, loss_on: LossOn = "masked", norm: bool = True
) -> Tensor:
    """Return the scalar loss of a ``region``, whose ``prediction`` is ``(B, T, rows * patch, columns * patch)``.

    ``frames`` are the whole ones, ``(B, T, H, W)``. It is what `reconstruction_loss` would be of the masked patches
    inside, or for ``loss_on="all"`` of an image with the mean error of all patches inside; 0 where there is none.
    """
    inside = crop(frames, region.whole(), region.extent())
    errors = patch_errors(prediction, inside, region.shape, norm)
    return _mean_error(errors, region.patches(grid.active), loss_on, grid.shape)


def decoded_loss(
    prediction: Tensor, packed: Tensor, decoded: PatchGrid, loss_on: LossOn = "masked", norm: bool = True
) -> Tensor:
    """Return the scalar loss of the patches of ``decoded``, ``prediction`` and ``packed`` frames ``(M, T, p, p)``.

    If these are drawn at random from the masked patches (or, for ``loss_on="all"``, from all), it is in expectation
    what `reconstruction_loss` is of the same predictions.
    """
    errors = patch_errors(prediction, packed, (1, 1), norm)
    return _mean_error(errors, torch.zeros_like(errors, dtype=torch.bool), loss_on, decoded.shape)


def _mean_error(errors: Tensor, active: Tensor, loss_on: LossOn, shape: tuple[int, int]) -> Tensor:
    """Return the loss of patches with ``errors`` and ``active`` ``(B, rows, columns)`` of images of a ``shape``."""
    if loss_on == "all":
        return errors.mean() * (shape[0] * shape[1])
    if loss_on != "masked":
        raise ValueError(f"loss_on must be 'masked' or 'all', got {loss_on!r}")
    masked = ~active
    return (errors * masked).sum() / masked.sum().clamp(min=1)


def _split(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """View ``(B, T, H, W)`` as ``(B, T, Gh, ph, Gw, pw)``."""
    if frames.ndim != 4 or frames.shape[2] % shape[0] or frames.shape[3] % shape[1]:
        raise ValueError(f"frames {tuple(frames.shape)} must be (B, T, H, W), H and W divisible by the grid {shape}")
    return frames.unflatten(3, (shape[1], -1)).unflatten(2, (shape[0], -1))


def _shape_of(statistics: PatchStatistics) -> tuple[int, int]:
    return statistics.mean.shape[2], statistics.mean.shape[4]
