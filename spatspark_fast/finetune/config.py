"""Options of `finetune` as dataclasses: plain values only, as in `spatspark_fast.training.options`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from spatspark_fast.common.options import check_least, check_most, need
from spatspark_fast.models.choices import Freeze, OutputNorm, TranslationKind
from spatspark_fast.training.options import (
    MANY,
    DataOptions,
    ModelOptions,
    Optimiser,
    OptimOptions,
    TrainerOptions,
    check_crop,
    check_training,
    idle_shared,
)

__all__ = [
    "DataConfig",
    "FinetuneConfig",
    "Kind",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Score",
    "TrainerConfig",
    "Weighting",
    "forecaster_name",
    "forecaster_options",
    "idle_options",
    "validate",
]

Kind = Literal["spatspark", "spark", "smaat"]
Weighting = Literal["none", "rain"]
Score = Literal["mse", "csi"]


@dataclass
class DataConfig(DataOptions):
    """Say which windows are read, and how.

    Args:
        output_length: frames that are forecast; null takes all that a window of the file has left
        validation_fraction: share of the windows, the newest ones, held out to choose the best checkpoint; 0 is none
    """

    batch_size: int = 16
    output_length: int | None = None
    validation_fraction: float = 0.1


@dataclass
class ModelConfig(ModelOptions):
    """Say what is trained; with a checkpoint of pretraining, encoder, decoder and input are those of the checkpoint.

    Args:
        kind: "spatspark", "spark" (spatspark with translation identity), or "smaat" (SmaAt-UNet)
        translation: between encoder and decoder: "conv_tanh" (the paper's), "identity", "residual_conv", "attention"
            (axial) or "recurrent" (ConvGRU over the lead times)
        output_norm: the output is a change since the newest frame ("persistence"), rain ("none"), or in units of mean
            and spread of the input patches ("input_patch"), interpolated between patches ("input_smooth")
        freeze: weights that stay as --init filled them: "none", "encoder", "decoder" or "both"
        base_width: channels of SmaAt-UNet's first stage
    """

    kind: Kind = "spatspark"
    translation: TranslationKind = "conv_tanh"
    output_norm: OutputNorm = "persistence"
    freeze: Freeze = "none"
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
    weighting: Weighting = "none"
    spectral_weight: float = 0.0


@dataclass
class OptimConfig(OptimOptions):
    """Say how weights move."""

    name: Optimiser = "adamw"
    base_lr: float = 8e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip: float = 1.0
    weight_decay: float = 0.01
    weight_decay_end: float = 0.01
    warmup_epochs: float = 2.0
    final_lr: float = 0.01


@dataclass
class TrainerConfig(TrainerOptions):
    """Say how long, where and with what record.

    Args:
        validate_every: epochs between two validations; the last epoch is always validated
        score: what makes a checkpoint the best: "mse" (lowest), or "csi" at 1 mm/h (highest)
        patience: validations without a better score after which training stops early; 0 never stops
    """

    epochs: int = 100
    validate_every: int = 1
    score: Score = "mse"
    patience: int = 15


@dataclass
class FinetuneConfig:
    """Hold every option of the command `finetune`.

    ``init`` is a checkpoint of `pretrain` or of `finetune`, an encoder.safetensors, or None for random weights.
    """

    init: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        """Read "none", as it is written on the command line and in YAML, as no weights."""
        self.init = None if self.init == "none" else self.init


AT_MOST = {
    **{"data.output_length": 4096, "model.base_width": 4096, "trainer.validate_every": MANY, "trainer.patience": MANY},
    **{"loss.ssim_weight": 1e6, "loss.spectral_weight": 1e6},
}


def validate(config: FinetuneConfig) -> None:
    """Check the values that need no file; raise `UserError` naming the option and the remedy."""
    check_training(config)
    check_least(config, ("data.output_length", "model.base_width", "trainer.validate_every"), 1)
    check_most(config, AT_MOST)
    check_least(config, ("loss.ssim_weight", "loss.spectral_weight", "trainer.patience"), 0)
    model, trainer, fraction = config.model, config.trainer, config.data.validation_fraction
    need(0 <= fraction < 1, "data.validation_fraction", fraction, "give a share of at least 0 and below 1")
    held = fraction > 0 or trainer.patience == 0
    need(held, "trainer.patience", trainer.patience, "without validation windows nothing can stop early; give 0")
    if model.kind != "smaat":
        check_crop(config)
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
        "decoder_norm": model.decoder_norm,
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


def idle_options(config: FinetuneConfig) -> dict[str, str]:
    """Return the options that play no part in a configuration, and why."""
    model = config.model
    idle = idle_shared(config)
    if model.kind == "smaat":
        names = ("encoder", "patch", "levels", "decoder", "decoder_norm", "input_scaling")  # presets set the others
        idle |= {f"model.{name}": "SmaAt-UNet has none" for name in (*names, "output_norm")}
    else:
        idle["model.base_width"] = "only SmaAt-UNet has it"
    if model.kind == "spark":
        idle["model.translation"] = "SparK has none: take --model.kind spatspark"
    if config.data.validation_fraction == 0:
        idle |= dict.fromkeys(("trainer.validate_every", "trainer.score"), "no window validates")
    return idle
