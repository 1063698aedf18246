"""Choose which patches of a window the encoder sees in a step of pretraining, and which are reconstructed.

Words: ``ratio`` is the *masked* share, ``keep`` the *visible* one, ``active`` is True where a patch is
visible. The masks of a step follow from (seed, rank, step) alone, so a resumed run repeats them without any
generator state in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchsparse import PatchGrid
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import check_choice
from spatspark_fast.models.choices import MaskSchedule, MaskStrategy, check_mask_ratios
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.patch_loss import contrast, patch_means
from spatspark_fast.models.region import Region, draw_region, region_shape
from spatspark_fast.models.spark import SparK

__all__ = [
    "MaskDraw",
    "MaskSampler",
    "decoded_counts",
    "draw_masks",
    "grids_of",
    "masks_of_step",
    "num_decoded",
    "num_visible",
    "wet_share",
]

# Streams of random numbers that must not repeat each other.
# The data order has 2 and the global generators of a step 3.
_RATIO_STREAM, _MASK_STREAM, _DECODE_STREAM = 0, 1, 4

LEAST_WORTH = 0.1  # of a patch without rain, so that every region is drawn sometimes; a patch full of rain has 1 more


def num_visible(num_patches: int, ratio: float) -> int:
    """Return how many of ``L`` patches stay visible at a mask ``ratio``: ``round(L * (1 - ratio))``, or 1."""
    return min(num_patches, max(1, round(num_patches * (1 - ratio))))


def num_decoded(num_patches: int, num_visible: int, share: float, masked: bool = True) -> int:
    """Return how many of ``L`` patches are reconstructed at a ``share``: ``round(L * share)``, at least 1.

    With ``masked``, no more than there are masked patches.
    """
    available = num_patches - num_visible if masked else num_patches
    return max(1, min(round(share * num_patches), available))


def wet_share(frames: Tensor, shape: tuple[int, int], threshold: float = 0.0) -> Tensor:
    """Return the share of each patch above ``threshold`` (data units), ``(B, Gh, Gw)`` float32 in [0, 1]."""
    return patch_means((frames > threshold).float(), shape)


class MaskSampler:
    """Draw one mask per window of a batch.

    Strategies: ``random`` takes any set of patches with equal probability. ``rain`` masks wet patches more
    often: at each draw without replacement a patch is ``exp(strength * wet share)`` times as likely to be
    masked as a dry one (20 times at the default strength 3 when all of it is wet); ``strength=0`` is
    ``random``.

    Schedules of the ratio over the progress of training, 0 to 1: ``constant`` stays at ``ratio``; ``linear``
    and ``cosine`` go from ``ratio`` to ``ratio_end``; ``interval`` draws a ratio for each step, uniform in
    [``ratio``, ``ratio_end``]. All ranks use the same ratio, so they do the same work, each with its own masks.

    Raises UserError for a value out of range.
    """

    def __init__(
        self,
        ratio: float = 0.6,
        ratio_end: float | None = None,
        schedule: MaskSchedule = "constant",
        strategy: MaskStrategy = "random",
        strength: float = 3.0,
        wet_threshold: float = 0.0,
        patch: int = 32,
        seed: int = 0,
    ) -> None:
        check_mask_ratios(ratio, ratio_end, schedule)
        check_choice("mask.strategy", strategy, MaskStrategy)
        if not math.isfinite(strength) or strength < 0:
            raise UserError(f"mask strength must be a number of at least 0, got {strength}")
        if seed < 0:
            raise UserError(f"mask seed must be at least 0, got {seed}")
        self.ratio = ratio
        self.ratio_end = ratio if ratio_end is None else ratio_end
        self.schedule: MaskSchedule = schedule
        self.strategy: MaskStrategy = strategy
        self.strength = strength
        self.wet_threshold = wet_threshold
        self.patch = patch
        self.seed = seed

    def __call__(self, frames: Tensor, step: int, progress: float = 0.0, rank: int = 0) -> PatchGrid:
        """Return the grid of a training ``step`` for ``frames`` ``(B, T, H, W)``, on their device.

        ``progress`` in [0, 1] is the share of training done. The random numbers are drawn on the CPU, so that
        a run gives the same masks on every device; they travel to it as one small copy and nothing is read
        back.
        """
        shape = grid_shape(frames.shape[-2:], self.patch)
        visible = num_visible(shape[0] * shape[1], self.ratio_at(progress, step))
        noise = self.noise(frames.shape[0], shape, step, rank)
        return self.grid(frames, noise.to(frames.device, non_blocking=True), visible)

    def draw(self, frames: Tensor, ratio: float, generator: torch.Generator) -> PatchGrid:
        """Return a grid for ``frames`` ``(B, T, H, W)`` at a given ``ratio``, from a CPU ``generator``."""
        shape = grid_shape(frames.shape[-2:], self.patch)
        noise = _gumbel(frames.shape[0], shape, generator)
        return self.grid(frames, noise.to(frames.device), num_visible(shape[0] * shape[1], ratio))

    def least_visible(self, size: Sequence[int]) -> int:
        """Return how many patches of an image of ``size`` (H, W) pixels are visible in the steps that hide most."""
        rows, columns = grid_shape(size, self.patch)
        return num_visible(rows * columns, max(self.ratio, self.ratio_end))

    def noise(self, batch: int, shape: tuple[int, int], step: int, rank: int = 0) -> Tensor:
        """Return the random part of the masks of a ``step``, ``(B, Gh, Gw)`` float32 on the CPU."""
        return _gumbel(batch, shape, _generator(_MASK_STREAM, self.seed, step, rank))

    def grid(self, frames: Tensor, noise: Tensor, visible: int) -> PatchGrid:
        """Return the grid for ``frames`` ``(B, T, H, W)`` with ``visible`` patches of each image, on their device.

        Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis 2006), in the form
        of Gumbel-top-k: the patches with the highest ``log weight + Gumbel noise`` are masked.
        """
        masking = noise
        if self.strategy == "rain":
            shape = (noise.shape[1], noise.shape[2])
            masking = noise + self.strength * wet_share(frames, shape, self.wet_threshold)
        return PatchGrid.from_scores(-masking, visible)

    def decoding_noise(self, shape: tuple[int, ...], step: int, rank: int = 0) -> Tensor:
        """Return the random numbers that choose what a ``step`` reconstructs, of a ``shape``, float32 on the CPU."""
        return torch.rand(shape, generator=_generator(_DECODE_STREAM, self.seed, step, rank))

    def ratio_at(self, progress: float, step: int = 0) -> float:
        """Return the mask ratio at a ``progress`` in [0, 1]; ``interval`` depends on ``step`` alone."""
        if self.schedule == "interval":
            generator = _generator(_RATIO_STREAM, self.seed, step)
            share = float(torch.rand((), generator=generator, dtype=torch.float64))
        else:
            share = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[
                self.schedule
            ]
        return self.ratio + (self.ratio_end - self.ratio) * min(max(share, 0.0), 1.0)


def decoded_counts(model: SparK, shape: tuple[int, int], visible: int, share: float) -> tuple[int, ...]:
    """Return what decides the shapes of what ``model`` reconstructs of images of ``shape`` (Gh, Gw) patches.

    By the U-Net rows and columns of a region with about a ``share`` of the patches, by the light decoder a number of
    patches; nothing for whole images, at a ``share`` of 1. There, too, patches are left out if that changes nothing
    (`SparK.decodes_apart`). ``visible`` patches of an image are seen.
    """
    patches = shape[0] * shape[1]
    if share >= 1 and not (model.decodes_apart and visible < patches):
        return ()
    if model.decodes_regions:
        return region_shape(shape, share)
    return (num_decoded(patches, visible, share, model.loss_on == "masked"),)


def decoded_grid(grid: PatchGrid, noise: Tensor, count: int, masked: bool) -> PatchGrid:
    """Return the grid of the ``count`` patches of each image with the most ``noise``, masked ones first if so asked."""
    return PatchGrid.from_scores(noise - 2 * grid.active if masked else noise, count)


class MaskDraw(NamedTuple):
    """Hold what is seen and what is reconstructed in a step, before its frames are known; nothing is on a device.

    ``visible`` counts patches of each image; it and ``decoded`` (`decoded_counts`) decide the shapes of tensors.
    ``noise`` holds random numbers, float32: of the masks ``(B, Gh, Gw)``, then of what is reconstructed, for a region
    ``(B, 1)``, for patches ``(B, Gh, Gw)``.
    """

    visible: int
    decoded: tuple[int, ...]
    noise: tuple[Tensor, ...]


def draw_masks(
    model: SparK,
    masks: MaskSampler,
    frames: tuple[int, ...],
    share: float,
    step: int,
    progress: float = 0.0,
    rank: int = 0,
) -> MaskDraw:
    """Draw the masks of a training ``step`` for frames of a shape ``(B, T, H, W)``; see `grids_of`."""
    batch, shape = frames[0], grid_shape(frames[-2:], masks.patch)
    visible = num_visible(shape[0] * shape[1], masks.ratio_at(progress, step))
    noise = masks.noise(batch, shape, step, rank)
    decoded = decoded_counts(model, shape, visible, share)
    if not decoded:
        return MaskDraw(visible, (), (noise,))
    size = (batch, 1) if model.decodes_regions else (batch, *shape)
    return MaskDraw(visible, decoded, (noise, masks.decoding_noise(size, step, rank)))


def grids_of(
    model: SparK,
    masks: MaskSampler,
    frames: Tensor,
    visible: int,
    decoded: Sequence[int],
    noise: Sequence[Tensor],
) -> tuple[PatchGrid, Region | PatchGrid | None]:
    """Return what a `MaskDraw` makes seen and reconstructed of ``frames``; ``noise`` is where they are.

    Nothing is read back from the device.
    """
    grid = masks.grid(frames, noise[0], visible)
    if not decoded:
        return grid, None
    if model.decodes_regions:
        rows, columns = decoded
        # A region without any hidden patch would have a loss of 0; most are larger than all that is visible.
        needed = ~grid.active if model.loss_on == "masked" and rows * columns <= visible else None
        return grid, draw_region(_worth(model, frames, grid), noise[1], (rows, columns), masks.patch, needed)
    return grid, decoded_grid(grid, noise[1], decoded[0], model.loss_on == "masked")


def masks_of_step(
    model: SparK, masks: MaskSampler, frames: Tensor, share: float = 1.0, step: int = 0, progress: float = 0.0
) -> tuple[PatchGrid, Region | PatchGrid | None]:
    """Return what is seen of ``frames`` and what is reconstructed in a ``step``, at a ``share`` of their patches."""
    visible, decoded, noise = draw_masks(model, masks, tuple(frames.shape), share, step, progress)
    return grids_of(model, masks, frames, visible, decoded, [numbers.to(frames.device) for numbers in noise])


def _worth(model: SparK, frames: Tensor, grid: PatchGrid) -> Tensor:
    """Return how much there is to learn from each patch, ``(B, Gh, Gw)``: its contrast, where the loss reads it."""
    found = contrast(frames, grid.shape)
    return (found if model.loss_on == "all" else found * ~grid.active) + LEAST_WORTH


def _gumbel(batch: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw Gumbel noise ``(B, Gh, Gw)`` float32 on the CPU."""
    uniform = torch.rand((batch, *shape), generator=generator, dtype=torch.float64)
    return (-torch.log(-torch.log(uniform.clamp(min=1e-300, max=1 - 1e-16)))).float()


def _generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the whole key; neighbouring keys are unrelated."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)
