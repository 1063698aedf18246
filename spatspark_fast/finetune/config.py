"""Options of the command `finetune` as dataclasses: plain values only, as in `config`."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from spatspark_fast.pretrain.config import OptimConfig, check_betas_and_devices, check_least, groups_from_plain, need

__all__ = [
    "FinetuneConfig",
    "ForecastDataConfig",
    "ForecastModelConfig",
    "ForecastTrainerConfig",
    "LossConfig",
    "forecaster_options",
    "from_plain",
    "to_plain",
    "validate",
]


@dataclass
class ForecastDataConfig:
    """Say which windows are read, and how.

    Args:
        path: HDF5 file in the NL-50 layout; without it the built-in synthetic radar serves
        split: group of the file to train and validate on, "train" or "test"
        input_length: frames that are seen, in time steps of 5 minutes
        output_length: frames that are forecast; null takes all that a window of the file has left
        validation_fraction: share of the windows, the newest ones, that are held out to choose the best
            checkpoint; windows that share frames with them are left out of training; 0 holds out none
        crop: side in pixels of a random square crop for training; without it the whole image
        flip: flip a window at random, left-right and up-down
        quarter_turns: turn a window at random by a multiple of 90 degrees
        batch_size: windows in one forward pass on one device; never more than there are
        num_workers: reading processes on each device; 0 reads in the training process
        synthetic_windows: number of windows of the synthetic radar
        synthetic_size: side in pixels (1 km each) of a synthetic image
    """

    path: str | None = None
    split: str = "train"
    input_length: int = 12
    output_length: int | None = None
    validation_fraction: float = 0.1
    crop: int | None = None
    flip: bool = False
    quarter_turns: bool = False
    batch_size: int = 16
    num_workers: int = 0
    synthetic_windows: int = 64
    synthetic_size: int = 288


@dataclass
class ForecastModelConfig:
    """Say what is trained.

    Args:
        kind: "spatspark", "spark" (spatspark with translation identity), or "smaat" (SmaAt-UNet)
        encoder: name of a timm backbone; with a pretraining checkpoint, that of the checkpoint
        patch: side in pixels of the patches of pretraining; images are multiples of it
        levels: feature maps used, at strides 4, 8, 16, 32
        decoder: "unet" (the published one) or "light"
        decoder_width: channels of the decoder's first block
        translation: network between encoder and decoder: "conv_tanh" (the paper's), "identity",
            "residual_conv", "attention" (axial) or "recurrent" (ConvGRU over the lead times)
        input_scaling: what the encoder sees: "log", log(1 + R) with R in mm/h, or "none", data values as published;
            with a pretraining checkpoint, that of the checkpoint
        output_norm: "persistence" adds the output to the newest frame, so that training begins with persistence;
            "none" takes it as rain; "input_patch" reads it in units of mean and spread of the input patches, as the
            published code does; "input_smooth" interpolates both between patches
        freeze: weights that stay as --init filled them: "none", "encoder", "decoder" or "both"
        base_width: channels of SmaAt-UNet's first stage
    """

    kind: Literal["spatspark", "spark", "smaat"] = "spatspark"
    encoder: str = "resnet18"
    patch: int = 32
    levels: int = 4
    decoder: Literal["unet", "light"] = "unet"
    decoder_width: int = 768
    translation: Literal["conv_tanh", "identity", "residual_conv", "attention", "recurrent"] = "conv_tanh"
    input_scaling: Literal["log", "none"] = "log"
    output_norm: Literal["persistence", "none", "input_patch", "input_smooth"] = "persistence"
    freeze: Literal["none", "encoder", "decoder", "both"] = "none"
    base_width: int = 64


@dataclass
class LossConfig:
    """Say what a good forecast is.

    Args:
        ssim_weight: weight of 1 - SSIM beside the mean squared error of data values; the paper's is 1e-4
        weighting: "none", or "rain", which weighs errors 2, 5, 10, 30 times from 2, 5, 10, 30 mm/h on
        spectral_weight: weight of the error of Fourier amplitudes, which makes blurred forecasts pay; 0 to 1
    """

    ssim_weight: float = 1e-4
    weighting: Literal["none", "rain"] = "none"
    spectral_weight: float = 0.0


@dataclass
class ForecastTrainerConfig:
    """Say how long, where and with what record.

    Args:
        epochs: passes over the training windows
        max_steps: stop after so many optimiser steps, if that comes first; the schedules end there too
        validate_every: epochs between two validations; the last epoch is always validated
        score: what makes a checkpoint the best: "mse" (lowest), or "csi" at 1 mm/h (highest)
        patience: validations without a better score after which training stops early; 0 never stops
        seed: seed of weights, data order, augmentation and drop-path
        precision: "fp32", or "bf16" (autocast; weights stay in float32)
        compile: torch.compile of the model: "off", or its mode: "default", "reduce-overhead" or "max-autotune"
        accumulate: forward passes for one optimiser step
        accelerator: "auto", "cpu" or "gpu"
        devices: number of devices, or "auto" for all (one process on a CPU)
        threads: threads of one process on a CPU; 0 leaves torch's own choice
        log_every: optimiser steps between two rows of metrics.csv
        keep_every: epochs between two checkpoints that are kept beside last.ckpt and best.ckpt; 0 keeps none
        tensorboard: write TensorBoard logs too
    """

    epochs: int = 100
    max_steps: int | None = None
    validate_every: int = 1
    score: Literal["mse", "csi"] = "mse"
    patience: int = 15
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: str = "auto"
    threads: int = 0
    log_every: int = 10
    keep_every: int = 0
    tensorboard: bool = True


def _optim() -> OptimConfig:
    return OptimConfig(
        name="adamw",
        base_lr=8e-3,
        betas=[0.9, 0.999],
        clip=1.0,
        weight_decay=0.01,
        weight_decay_end=0.01,
        warmup_epochs=2.0,
        final_lr=0.01,
    )


@dataclass
class FinetuneConfig:
    """Hold every option of the command `finetune`.

    ``init`` is a checkpoint of `pretrain` or of `finetune`, an encoder.safetensors, or None for random weights.
    """

    init: str | None = None
    data: ForecastDataConfig = field(default_factory=ForecastDataConfig)
    model: ForecastModelConfig = field(default_factory=ForecastModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=_optim)
    trainer: ForecastTrainerConfig = field(default_factory=ForecastTrainerConfig)


GROUPS: dict[str, type] = {
    "data": ForecastDataConfig,
    "model": ForecastModelConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "trainer": ForecastTrainerConfig,
}

AT_LEAST_ONE = (
    *("data.input_length", "data.output_length", "data.batch_size", "data.crop"),
    *("data.synthetic_windows", "data.synthetic_size"),
    *("model.patch", "model.levels", "model.decoder_width", "model.base_width"),
    *("trainer.epochs", "trainer.max_steps", "trainer.validate_every", "trainer.accumulate", "trainer.log_every"),
)
AT_LEAST_ZERO = (
    *("data.num_workers", "loss.ssim_weight", "loss.spectral_weight"),
    *("optim.clip", "optim.weight_decay", "optim.weight_decay_end", "optim.warmup_epochs"),
    *("trainer.seed", "trainer.threads", "trainer.keep_every", "trainer.patience"),
)


def to_plain(config: FinetuneConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts of plain values."""
    return asdict(config)


def from_plain(plain: dict[str, Any]) -> FinetuneConfig:
    """Build a configuration from nested dicts; unknown names raise `UserError`."""
    return FinetuneConfig(init=plain.get("init"), **groups_from_plain(GROUPS, plain))


def validate(config: FinetuneConfig) -> None:
    """Check the values that need no file; raise `UserError` naming the option and the remedy."""
    check_least(config, AT_LEAST_ONE, 1)
    check_least(config, AT_LEAST_ZERO, 0)
    data, model, optim, trainer = config.data, config.model, config.optim, config.trainer
    fraction = data.validation_fraction
    need(0 <= fraction < 1, "data.validation_fraction", fraction, "give a share of at least 0 and below 1")
    held = fraction > 0 or trainer.patience == 0
    need(held, "trainer.patience", trainer.patience, "without validation windows nothing can stop early; give 0")
    need(0 < optim.base_lr < math.inf, "optim.base_lr", optim.base_lr, "give a positive number, for example 8e-3")
    need(0 <= optim.final_lr <= 1, "optim.final_lr", optim.final_lr, "give a share of the peak, 0 to 1")
    need(0 <= optim.ema < 1, "optim.ema", optim.ema, "give a decay of at least 0 and below 1, for example 0.999")
    check_betas_and_devices(optim.betas, trainer.devices)
    unfilled = model.freeze == "none" or (config.init is not None and model.kind != "smaat")
    need(unfilled, "model.freeze", model.freeze, "only weights that --init has filled can be frozen")


def forecaster_options(config: FinetuneConfig, scale: float) -> tuple[str, dict[str, Any]]:
    """Return kind and options for `build_forecaster`; ``scale`` in mm per 5 min sets the unit of the output."""
    model = config.model
    if model.kind == "smaat":
        return "smaat", {"base_width": model.base_width, "unit": 1 / scale}
    return "spatspark", {
        "encoder": model.encoder,
        "patch": model.patch,
        "levels": model.levels,
        "decoder": model.decoder,
        "decoder_width": model.decoder_width,
        "translation": "identity" if model.kind == "spark" else model.translation,
        "output_norm": model.output_norm,
        "unit": 1 / scale,
        "input_scaling": model.input_scaling,
    }


def forecaster_name(config: FinetuneConfig) -> str:
    """Return a short name for tables and pictures."""
    model = config.model
    if model.kind == "smaat":
        return "SmaAt-UNet"
    start = "scratch" if config.init is None else "pretrained"
    if model.kind == "spark" or model.translation == "identity":
        return f"SparK {model.encoder} ({start})"
    return f"SpaT-SparK {model.encoder} ({model.translation}, {start})"
