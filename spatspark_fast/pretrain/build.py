"""Turn options into what they name: data, model, masks."""

from typing import Any

import torch
from torch.utils.data import Dataset

from patchsparse import available_backends, why_unavailable
from patchsparse.backends import ENGINES, requested
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.models.spark import SparK, build_spark
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.options import DataOptions

__all__ = ["Remembered", "Windows", "build_masks", "build_model", "open_windows"]

REMEMBERED = 256  # windows of 12 x 288 x 288 take 1 GiB
SYNTHETIC_SEED = 0  # the built-in data set is always the same; the seed of a run does not change its data


class Remembered(Dataset[dict[str, Any]]):
    """Keep made-up windows once made: they are the same in every epoch, and making them takes time."""

    def __init__(self, windows: SyntheticRadar) -> None:
        self.windows = windows
        self.image_size = windows.image_size
        self.scale = windows.scale
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        item = self.windows[index]
        if len(self._kept) < REMEMBERED:
            self._kept[index] = item
        return item

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, as synthetic radar does."""


Windows = NowcastDataset | Remembered


def open_windows(config: DataOptions, seed: int = 0) -> Windows:
    """Open the data set, or the synthetic radar where no file is named."""
    if config.path is None:
        if config.crop is not None or config.flip or config.quarter_turns:
            raise UserError("--data.crop, --data.flip and --data.quarter_turns need a file: give --data.path")
        return Remembered(
            SyntheticRadar(
                config.synthetic_windows,
                input_length=config.input_length,
                output_length=0,
                image_size=config.synthetic_size,
                seed=SYNTHETIC_SEED,
            )
        )
    return NowcastDataset(
        config.path,
        config.split,
        input_length=config.input_length,
        output_length=0,
        crop=config.crop,
        flip=config.flip,
        quarter_turns=config.quarter_turns,
        seed=seed,
    )


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
        dense_decoder_blocks=model.dense_decoder_blocks,
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
