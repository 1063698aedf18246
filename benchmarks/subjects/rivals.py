"""Rivals of the packed training step: the published way, and the best dense step that we can write."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from inspect import signature
from typing import cast

import timm
import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import Tensor, nn

from patchsparse import PatchGrid
from patchsparse.testing import DenseAndMask
from spatspark_fast.models.choices import LossOn
from spatspark_fast.models.decoder import UNetBlock, UNetDecoder
from spatspark_fast.models.densify import DensifyLevel
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.models.patch_loss import reconstruction_loss
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import SparK
from spatspark_fast.training.optim import parameter_groups, set_rates

from .steps import BETAS, CLIP, RATES, Marks, OurStep, Step, no_mark

__all__ = ["DenseStep", "Published", "PublishedStep"]


class Published(nn.Module):
    """Run SparK as its published code does: whole images, masked before every layer that looks around, NCHW, eager.

    Its weights are copies of those of ``spark``, under other names; the loss is the same.
    """

    def __init__(self, spark: SparK, encoder: str, grid: PatchGrid) -> None:
        super().__init__()
        plain = timm.create_model(encoder, in_chans=spark.in_chans, features_only=True)
        plain.load_state_dict(spark.encoder.state_dict())
        device = next(spark.parameters()).device
        self.encoder = DenseAndMask(plain.to(device), grid)
        self.densify = copy.deepcopy(spark.densify)
        self.decoder = copy.deepcopy(cast(UNetDecoder, spark.decoder))
        self.loss_on: LossOn = spark.loss_on
        self.to(memory_format=torch.contiguous_format)

    def forward(self, frames: Tensor, grid: PatchGrid) -> Tensor:
        """Return the loss of ``frames`` ``(B, T, H, W)``."""
        return self.decode(self.encode(frames, grid), frames, grid)

    def encode(self, frames: Tensor, grid: PatchGrid) -> Sequence[Tensor]:
        """Return the feature maps ``(B, C, H/s, W/s)``."""
        self.encoder.grid = grid
        return self.encoder(frames)

    def decode(self, features: Sequence[Tensor], frames: Tensor, grid: PatchGrid) -> Tensor:
        """Return the loss of the features."""
        levels = cast(Sequence[DensifyLevel], self.densify.levels)
        *skips, x = (self._dense(level, f, grid) for level, f in zip(levels, features[-len(levels) :], strict=True))
        for index, block in enumerate(cast(Sequence[UNetBlock], self.decoder.blocks)):
            if index > 0 and skips:
                x = x + skips.pop()
            x = block.act(block.norm1(block.conv1(block.up(x))))
            x = block.norm2(block.conv2(x))
        return reconstruction_loss(self.decoder.head(x), frames, grid, self.loss_on)

    def _dense(self, level: DensifyLevel, features: Tensor, grid: PatchGrid) -> Tensor:
        active = grid.pixels(features.shape[2:])
        visible = level.norm(features.permute(0, 2, 3, 1)[active][:, :, None, None])
        whole = level.mask_token.expand(*active.shape, -1).clone()
        whole[active] = visible[:, :, 0, 0].to(whole.dtype)
        return level.proj(whole.permute(0, 3, 1, 2).contiguous())


class PublishedStep(Step):
    """Step `Published` with per-parameter LAMB and PyTorch's clipping, on frames that are float32 already."""

    def __init__(self, model: Published, frames: Tensor, masks: MaskSampler) -> None:
        self.model = model.train()
        self.frames = frames
        self.masks = masks
        self.position = 0
        groups = parameter_groups(model.named_parameters())
        alone = (
            {"foreach": False} if "foreach" in signature(TimmLamb).parameters else {}
        )  # older versions know no other
        self.optimizer = TimmLamb(groups, betas=BETAS, max_grad_norm=None, **alone)
        set_rates(self.optimizer.param_groups, *RATES)

    def loss(self, marks: Marks = no_mark) -> Tensor:
        """Return the loss of the next step."""
        self.position += 1
        grid = self.masks(self.frames, step=self.position)
        marks("data")
        return self.run(self.frames, grid, None, marks)

    def run(self, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None, marks: Marks) -> Tensor:
        """Return the loss of ``frames`` ``(B, T, H, W)``; all patches are decoded."""
        features = marks("encoder", self.model.encode(frames, grid))
        return self.model.decode(features, frames, grid)

    def clip(self) -> None:
        """Clip the gradients as PyTorch does."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)


class DenseStep(OurStep):
    """Step the same model with a dense encoder: the best that whole images allow.

    Everything else is ours: frames in 16 bits, channels_last, the exact decoder with its composed convolutions, fused
    LAMB. The frames are set to 0 where they are masked, and nothing is masked after that: the masking is free. So the
    features at the rims of visible patches are not SparK's, and norms see masked positions too. With every patch
    visible the step is exactly ours; that is how it is checked.
    """

    def run(self, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None, marks: Marks) -> Tensor:
        """Return the loss of ``frames``; all patches are decoded."""
        model = self.model
        visible = (frames * grid.pixels(frames.shape[2:]).unsqueeze(1)).contiguous(memory_format=torch.channels_last)
        features = marks("encoder", model.encode_dense(visible))
        levels = cast(Sequence[DensifyLevel], model.densify.levels)
        dense = [self._densified(level, f, grid) for level, f in zip(levels, features[-len(levels) :], strict=True)]
        return reconstruction_loss(model.decoder(dense, backend=model.backend), frames, grid, model.loss_on)

    def _densified(self, level: DensifyLevel, features: Tensor, grid: PatchGrid) -> Tensor:
        active = grid.pixels(features.shape[2:]).unsqueeze(1)
        normed = level.norm(features)
        image = torch.where(active, normed, level.mask_token.to(normed.dtype)[:, None, None])
        return level.project(image, self.model.backend)
