"""Options of `pretrain` as dataclasses: plain values only, as in `spatspark_fast.training.options`."""

from dataclasses import dataclass, field

from spatspark_fast.common.options import check_least, check_most, need
from spatspark_fast.models.choices import LossOn, MaskSchedule, MaskStrategy, check_mask_ratios
from spatspark_fast.training.options import (
    MANY,
    DataOptions,
    ModelOptions,
    OptimOptions,
    TrainerOptions,
    check_crop,
    check_training,
    idle_shared,
)

__all__ = ["MaskConfig", "ModelConfig", "PretrainConfig", "TrainerConfig", "idle_options", "validate"]


@dataclass
class MaskConfig:
    """Say which patches the encoder does not see.

    Args:
        strategy: "random", or "rain", which hides wet patches more often
        ratio: share of patches that is hidden, above 0 and below 1; the value at the start of a schedule
        schedule: ratio over training: "constant", "interval" (uniform between both values), "linear" or "cosine"
        ratio_end: the other value of a schedule; needed unless it is constant
        strength: for "rain": a patch that is wet all over is exp(strength) times as likely to be hidden as a dry one
    """

    strategy: MaskStrategy = "random"
    ratio: float = 0.6
    schedule: MaskSchedule = "constant"
    ratio_end: float | None = None
    strength: float = 3.0


@dataclass
class ModelConfig(ModelOptions):
    """Say what is trained.

    Args:
        decode_ratio: share of an image's patches that a step reconstructs: 1 is all; below, a rectangle of them, drawn
            where there is rain (what it reads around it is not counted), or by "light" so many masked patches
        loss_on: "masked" patches only (SparK), or "all" patches
        backend: engine of the sparse convolutions; "auto" chooses by device, dtype and shape
    """

    decode_ratio: float = 1.0
    loss_on: LossOn = "masked"
    backend: str = "auto"


@dataclass
class TrainerConfig(TrainerOptions):
    """Say how long, where and with what record.

    Args:
        picture_every: epochs between two pictures of the reconstruction; 0 draws only the last
        exact_finish: last share of the steps that reconstruct whole images whatever decode_ratio is, so that pictures
            and the statistics of norms are those of whole images
        savings: measure at the end what the sparse path saves against dense-and-mask
    """

    picture_every: int = 50
    exact_finish: float = 0.1
    savings: bool = True


@dataclass
class PretrainConfig:
    """Hold every option of the command `pretrain`."""

    data: DataOptions = field(default_factory=DataOptions)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def validate(config: PretrainConfig) -> None:
    """Check the values that need no file; raise `UserError` naming the option and the remedy."""
    check_training(config)
    check_least(config, ("mask.strength", "trainer.picture_every"), 0)
    check_most(config, {"mask.strength": 1000, "trainer.picture_every": MANY})
    mask, model = config.mask, config.model
    check_mask_ratios(mask.ratio, mask.ratio_end, mask.schedule)
    for option, ratio in (("mask.ratio", mask.ratio), ("mask.ratio_end", mask.ratio_end)):
        need(ratio is None or ratio > 0, option, ratio, "with nothing hidden there is nothing to learn from")
    need(0 < model.decode_ratio <= 1, "model.decode_ratio", model.decode_ratio, "give a share above 0, at most 1")
    finish = config.trainer.exact_finish
    need(0 <= finish <= 1, "trainer.exact_finish", finish, "give a share of the steps, 0 to 1")
    check_crop(config)


def idle_options(config: PretrainConfig) -> dict[str, str]:
    """Return the options that play no part in a configuration, and why."""
    idle = idle_shared(config)
    if config.mask.strategy == "random":
        idle["mask.strength"] = "random masks do not look at the rain"
    if config.model.decode_ratio >= 1:
        idle["trainer.exact_finish"] = "all steps reconstruct whole images"
    return idle
