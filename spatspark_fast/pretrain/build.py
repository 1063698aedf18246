"""Turn options into what they name: model and masks."""

from collections.abc import Sequence

import torch

from patchsparse import available_backends, why_unavailable
from patchsparse.backends import ENGINES, requested
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.choices import check_ratio_of_grid
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.models.spark import SparK, build_spark
from spatspark_fast.pretrain.config import PretrainConfig

__all__ = ["build_masks", "build_model", "check_masks"]


def build_model(config: PretrainConfig) -> SparK:
    """Build the model of a configuration; raise `UserError` for names that do not exist."""
    model = config.model
    _check_engine(model.backend, torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32)
    return build_spark(
        encoder=model.encoder,
        in_chans=config.data.input_length,
        patch=model.patch,
        decoder=model.decoder,
        decoder_width=model.decoder_width,
        loss_on=model.loss_on,
        input_scaling=model.input_scaling,
        backend=model.backend,
        levels=model.levels,
        decoder_norm=model.decoder_norm,
    )


def _check_engine(backend: str, dtype: torch.dtype) -> None:
    """Raise `UserError` with the reason if the engine that is named, here or in the environment, cannot run."""
    name = requested(backend)
    if name == "auto":
        return
    reason = why_unavailable(name, dtype) if name in ENGINES else "there is no such engine"
    if reason is not None:
        here = ", ".join(("auto", *available_backends()))
        raise UserError(f"--model.backend is {name}: {reason}; here one of {here} can run")


def build_masks(config: PretrainConfig) -> MaskSampler:
    """Build the sampler of masks of a configuration."""
    mask = config.mask
    return MaskSampler(
        ratio=mask.ratio,
        ratio_end=mask.ratio_end,
        schedule=mask.schedule,
        strategy=mask.strategy,
        strength=mask.strength,
        patch=config.model.patch,
        seed=config.trainer.seed,
    )


def check_masks(config: PretrainConfig, size: Sequence[int]) -> None:
    """Raise `UserError` unless every step hides a patch of images of ``size`` (H, W) pixels, and shows another."""
    mask, patch = config.mask, config.model.patch
    shape = grid_shape(size, patch)
    check_ratio_of_grid("mask.ratio", mask.ratio, shape, patch)
    if mask.ratio_end is not None:
        check_ratio_of_grid("mask.ratio_end", mask.ratio_end, shape, patch)
