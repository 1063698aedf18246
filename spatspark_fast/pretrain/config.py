"""Options of the commands as dataclasses; `cli` turns them into ``--group.name`` options and YAML.

Only plain values live here (numbers, strings, booleans, lists, None), so that a configuration goes unchanged
into YAML, into a checkpoint that loads with ``weights_only=True``, and back.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from spatspark_fast.common.errors import UserError

__all__ = [
    "DataConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "TrainerConfig",
    "check_betas_and_devices",
    "check_least",
    "differences",
    "from_plain",
    "groups_from_plain",
    "need",
    "to_plain",
    "validate",
]


@dataclass
class DataConfig:
    """Say which windows are read, and how.

    Args:
        path: HDF5 file in the NL-50 layout; without it the built-in synthetic radar serves
        split: group of the file to train on, "train" or "test"
        input_length: frames of a window, in time steps of 5 minutes; they become the channels of one image
        crop: side in pixels of a random square crop; without it the whole image
        flip: flip a window at random, left-right and up-down
        quarter_turns: turn a window at random by a multiple of 90 degrees
        batch_size: windows in one forward pass on one device; never more than the data set has
        resident: where the windows stay during training: "device", uncompressed in the memory of the GPU (on a
            CPU as "host"); "host", in the memory of the machine, sent ahead of their use; "auto", on the GPU if
            they take at most a third of its free memory; "off" reads the file window by window
        cache: folder for the uncompressed copy of the file, which is made once; by default spatspark-fast in the
            user's cache folder
        num_workers: reading processes on each device, in training with resident "off", else to unpack the file;
            0 reads in the training process
        synthetic_windows: number of windows of the synthetic radar
        synthetic_size: side in pixels (1 km each) of a synthetic image
    """

    path: str | None = None
    split: str = "train"
    input_length: int = 12
    crop: int | None = None
    flip: bool = False
    quarter_turns: bool = False
    batch_size: int = 128
    resident: Literal["auto", "device", "host", "off"] = "auto"
    cache: str | None = None
    num_workers: int = 0
    synthetic_windows: int = 64
    synthetic_size: int = 288


@dataclass
class MaskConfig:
    """Say which patches the encoder does not see.

    Args:
        strategy: "random", or "rain", which hides wet patches more often
        ratio: share of patches that is hidden, at least 0 and below 1; the value at the start of a schedule
        schedule: how the ratio goes over training: "constant", "interval" (uniform between both values, anew
            each step), "linear" or "cosine" (from the one to the other)
        ratio_end: the other value of a schedule; needed unless it is constant
        strength: for "rain": a patch that is wet all over is exp(strength) times as likely to be hidden as a
            dry one
    """

    strategy: Literal["random", "rain"] = "random"
    ratio: float = 0.6
    schedule: Literal["constant", "interval", "linear", "cosine"] = "constant"
    ratio_end: float | None = None
    strength: float = 3.0


@dataclass
class ModelConfig:
    """Say what is trained.

    Args:
        encoder: name of a timm backbone, for example resnet18, resnet50 or convnext_tiny
        patch: side in pixels of the square patches that are hidden or seen
        decoder: "unet" (the published one) or "light" (one block and a 1x1 convolution)
        decoder_width: channels of the decoder's first block
        decode_ratio: share of an image's patches that are reconstructed in a training step, masked patches at
            random, anew each step; 1 is the whole image, or all that are masked by the light decoder
        dense_decoder_blocks: first blocks of the U-Net that run on the whole image even if decode_ratio is below 1
        levels: feature maps used, at strides 4, 8, 16, 32; fewer than 4 allow patches of 16 or 8 pixels
        loss_on: "masked" patches only (SparK), or "all" patches
        input_scaling: what the encoder sees: "log", log(1 + R) with R in mm/h, or "none", data values as published
        backend: engine of the sparse convolutions; "auto" chooses by device, dtype and shape
    """

    encoder: str = "resnet18"
    patch: int = 32
    decoder: Literal["unet", "light"] = "unet"
    decoder_width: int = 768
    decode_ratio: float = 1.0
    dense_decoder_blocks: int = 1
    levels: int = 4
    loss_on: Literal["masked", "all"] = "masked"
    input_scaling: Literal["log", "none"] = "log"
    backend: str = "auto"


@dataclass
class OptimConfig:
    """Say how weights move.

    Args:
        name: "lamb" or "adamw"
        base_lr: peak learning rate for 256 windows per optimiser step; scaled in proportion to the real
            number
        betas: decay rates of the first and the second moment
        clip: largest norm of the whole gradient; 0 switches clipping off
        weight_decay: weight decay at the start; 1-D parameters and mask tokens have none
        weight_decay_end: weight decay at the end, reached along a cosine
        warmup_epochs: epochs of linear warm-up; at most a quarter of training is used for it
        final_lr: learning rate at the end as a share of its peak, reached along a cosine
        ema: decay of the exponential moving average of the weights, for example 0.9999; 0 keeps none
    """

    name: Literal["lamb", "adamw"] = "lamb"
    base_lr: float = 2e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 5.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2
    warmup_epochs: float = 40.0
    final_lr: float = 0.001
    ema: float = 0.0


@dataclass
class TrainerConfig:
    """Say how long, where and with what record.

    Args:
        epochs: passes over the data
        max_steps: stop after so many optimiser steps, if that comes first; the schedules end there too
        seed: seed of weights, data order, augmentation, masks and drop-path
        precision: "fp32", or "bf16" (autocast; weights stay in float32)
        compile: torch.compile of the model: "off", or its mode: "default", "reduce-overhead" (CUDA graphs, for
            small batches) or "max-autotune"
        accumulate: forward passes for one optimiser step
        accelerator: "auto", "cpu" or "gpu"
        devices: number of devices, or "auto" for all (one process on a CPU)
        threads: threads of one process on a CPU; 0 leaves torch's own choice
        log_every: optimiser steps between two rows of metrics.csv
        picture_every: epochs between two pictures of the reconstruction; 0 draws only the last
        keep_every: epochs between two checkpoints that are kept beside last.ckpt; 0 keeps none
        tensorboard: write TensorBoard logs too
        savings: measure at the end what the sparse path saves against dense-and-mask
    """

    epochs: int = 1600
    max_steps: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: str = "auto"
    threads: int = 0
    log_every: int = 10
    picture_every: int = 50
    keep_every: int = 0
    tensorboard: bool = True
    savings: bool = True


@dataclass
class PretrainConfig:
    """Hold every option of the command `pretrain`."""

    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "mask": MaskConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "trainer": TrainerConfig,
}


AT_LEAST_ONE = (
    *("data.input_length", "data.batch_size", "data.crop", "data.synthetic_windows", "data.synthetic_size"),
    *("model.patch", "model.levels", "model.decoder_width", "model.dense_decoder_blocks"),
    *("trainer.epochs", "trainer.max_steps", "trainer.accumulate", "trainer.log_every"),
)
AT_LEAST_ZERO = (
    *("data.num_workers", "mask.strength"),
    *("optim.clip", "optim.weight_decay", "optim.weight_decay_end", "optim.warmup_epochs"),
    *("trainer.seed", "trainer.threads", "trainer.picture_every", "trainer.keep_every"),
)


def to_plain(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    """Return the configuration as nested dicts of plain values."""
    return asdict(config)


def from_plain(plain: dict[str, dict[str, Any]]) -> PretrainConfig:
    """Build a configuration from nested dicts; unknown names raise `UserError`."""
    return PretrainConfig(**groups_from_plain(GROUPS, plain))


def groups_from_plain(kinds: Mapping[str, type], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Build the groups of options of a command from nested dicts; unknown names raise `UserError`."""
    groups = {}
    for name, group in kinds.items():
        values = dict(plain.get(name) or {})
        known = {f.name for f in fields(group)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"unknown option {name}.{unknown[0]}; known are {', '.join(sorted(known))}")
        groups[name] = group(**values)
    return groups


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Name the options that differ, as ``group.name (theirs -> ours)``."""
    found = []
    for group in sorted(set(ours) | set(theirs)):
        a, b = ours.get(group) or {}, theirs.get(group) or {}
        names = sorted(set(a) | set(b))
        found += [f"{group}.{n} ({b.get(n)} -> {a.get(n)})" for n in names if a.get(n) != b.get(n)]
    return found


def need(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raise `UserError` naming the option, its value and the remedy, unless the condition holds."""
    if not condition:
        raise UserError(f"--{option} is {value}: {remedy}")


def check_least(config: object, options: Iterable[str], least: int) -> None:
    """Raise `UserError` for the first of the ``group.name`` options that is given and below ``least``."""
    for option in options:
        group, name = option.split(".")
        value = getattr(getattr(config, group), name)
        fits = value is None or (math.isfinite(value) and value >= least)
        need(fits, option, value, f"give a number of at least {least}")


def check_betas_and_devices(betas: Sequence[float], devices: str) -> None:
    """Raise `UserError` for values of ``optim.betas`` or ``trainer.devices`` that mean nothing."""
    need(len(betas) == 2 and all(0 <= b < 1 for b in betas), "optim.betas", betas, "give two numbers in [0, 1)")
    need(devices == "auto" or devices.isdigit(), "trainer.devices", devices, 'give a number or "auto"')
    need(devices != "0", "trainer.devices", devices, 'give at least 1, or "auto"')


def validate(config: PretrainConfig) -> None:
    """Check the values that need no file; raise `UserError` naming the option and the remedy."""
    check_least(config, AT_LEAST_ONE, 1)
    check_least(config, AT_LEAST_ZERO, 0)
    mask, optim = config.mask, config.optim
    share = "give a share of hidden patches of at least 0 and below 1, for example 0.6"
    need(0 <= mask.ratio < 1, "mask.ratio", mask.ratio, share)
    need(mask.ratio_end is None or 0 <= mask.ratio_end < 1, "mask.ratio_end", mask.ratio_end, share)
    if mask.schedule == "constant":
        need(mask.ratio > 0, "mask.ratio", mask.ratio, "with nothing hidden there is nothing to learn from")
        need(
            mask.ratio_end in (None, mask.ratio),
            "mask.ratio_end",
            mask.ratio_end,
            "choose a --mask.schedule for it",
        )
    else:
        need(mask.ratio_end is not None, "mask.ratio_end", None, f"the schedule {mask.schedule} needs it")
    need(
        0 < optim.base_lr < math.inf,
        "optim.base_lr",
        optim.base_lr,
        "give a positive number, for example 2e-4",
    )
    need(0 <= optim.final_lr <= 1, "optim.final_lr", optim.final_lr, "give a share of the peak, 0 to 1")
    need(
        0 <= optim.ema < 1,
        "optim.ema",
        optim.ema,
        "give a decay of at least 0 and below 1, for example 0.9999",
    )
    model = config.model
    need(0 < model.decode_ratio <= 1, "model.decode_ratio", model.decode_ratio, "give a share above 0, at most 1")
    check_betas_and_devices(optim.betas, config.trainer.devices)
    crop, patch = config.data.crop, config.model.patch
    need(crop is None or crop % patch == 0, "data.crop", crop, f"give a multiple of --model.patch {patch}")
