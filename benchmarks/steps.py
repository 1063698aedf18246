"""Whole training steps to compare: ours, and the published way of the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import timm
import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import Tensor, nn

from patchsparse import PatchGrid
from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.resident import Place, place_windows
from spatspark_fast.data.store import in_memory
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.losses import LossOn, reconstruction_loss
from spatspark_fast.masks import MaskSampler
from spatspark_fast.models.decoder import UNetBlock, UNetDecoder
from spatspark_fast.models.densify import DensifyLevel
from spatspark_fast.models.spark import SparK, build_spark
from spatspark_fast.training.lamb import Lamb, clip_gradients
from spatspark_fast.training.optim import parameter_groups, set_rates
from spatspark_fast.training.savings import DenseAndMask

__all__ = ["MASKED", "OurStep", "Published", "PublishedStep", "Step", "build", "windows_on"]

RATES = (2e-4, 0.04)  # learning rate and weight decay
BETAS, CLIP = (0.9, 0.95), 5.0
MASKED = 0.6


def windows_on(device: torch.device, batch: int, size: int, frames: int, augmentation: Augmentation) -> Place:
    """Return ``batch`` windows of synthetic radar in the memory of a device, 16 bits a pixel."""
    radar = SyntheticRadar(batch, frames, 0, size)
    return place_windows(
        in_memory(radar, radar.scale), augmentation, "host" if device.type == "cpu" else "device", device
    )


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
        self.encoder.active = grid.active
        features = self.encoder(frames)
        levels = cast(Sequence[DensifyLevel], self.densify.levels)
        *skips, x = (self._dense(level, f, grid) for level, f in zip(levels, features[-len(levels) :], strict=True))
        for index, block in enumerate(cast(Sequence[UNetBlock], self.decoder.blocks)):
            if index > 0 and skips:
                x = x + skips.pop()
            x = block.act(block.norm1(block.conv1(block.up(x))))
            x = block.norm2(block.conv2(x))
        return reconstruction_loss(self.decoder.head(x), frames, grid, self.loss_on)

    def _dense(self, level: DensifyLevel, features: Tensor, grid: PatchGrid) -> Tensor:
        rows, columns = (features.shape[2 + axis] // grid.shape[axis] for axis in (0, 1))
        active = grid.active.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        visible = level.norm(features.permute(0, 2, 3, 1)[active][:, :, None, None])
        whole = level.mask_token.expand(*active.shape, -1).clone()
        whole[active] = visible[:, :, 0, 0].to(whole.dtype)
        return level.proj(whole.permute(0, 3, 1, 2).contiguous())


class PublishedStep:
    """Step `Published` with per-parameter LAMB and PyTorch's clipping, on frames that are float32 already."""

    def __init__(self, model: Published, frames: Tensor, masks: MaskSampler) -> None:
        self.model = model.train()
        self.frames = frames
        self.masks = masks
        self.position = 0
        groups = parameter_groups(model.named_parameters())
        self.optimizer = TimmLamb(groups, betas=BETAS, max_grad_norm=None, foreach=False)
        set_rates(self.optimizer.param_groups, *RATES)

    def __call__(self) -> Tensor:
        """Train one step; return its loss."""
        self.position += 1
        loss = self.model(self.frames, self.masks(self.frames, step=self.position))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()


class OurStep:
    """Step a `SparK` model as `python -m spatspark_fast.pretrain` does, from 16 bits a pixel to the new weights."""

    def __init__(
        self,
        model: SparK,
        place: Place,
        batch: int,
        masks: MaskSampler,
        decode_ratio: float = 1.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.train()
        self.masks = masks
        self.decode_ratio = decode_ratio
        self.precision = precision
        self.position = 0
        self.frames = _endless(place, batch)
        self.optimizer = Lamb(parameter_groups(model.named_parameters()), betas=BETAS)
        set_rates(self.optimizer.param_groups, *RATES)

    def loss(self) -> Tensor:
        """Return the loss of the next step."""
        self.position += 1
        frames = next(self.frames)
        grid = self.masks(frames, step=self.position)
        decoded = None
        if self.decode_ratio < 1:
            decoded = self.masks.decoded(grid, self.decode_ratio, step=self.position)
        with torch.autocast(frames.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            return self.model(frames, grid, decoded).loss

    def __call__(self) -> Tensor:
        """Train one step; return its loss."""
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()


def _endless(place: Place, batch: int) -> Iterator[Tensor]:
    keys = [(0, index) for index in range(batch)]
    while True:
        yield from place.batches([keys])


def build(decoder: str, width: int, device: torch.device, encoder: str, frames: int) -> SparK:
    """Build a model of equal weights in every call."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"decoder": decoder, "decoder_width": width, "in_chans": frames}
    return build_spark(encoder, **options).to(device)


Step = Callable[[], Tensor]
