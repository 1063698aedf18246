"""The step of finetuning as a Lightning module: a forecaster, its loss, and what its checkpoints say."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from spatspark_fast.common.options import to_plain
from spatspark_fast.finetune.config import FinetuneConfig, forecaster_name, forecaster_options
from spatspark_fast.finetune.loss import ForecastLoss
from spatspark_fast.models.forecaster import Forecaster
from spatspark_fast.models.registry import DESCRIPTION, PREFIX, describe_forecaster
from spatspark_fast.training.average import averaged
from spatspark_fast.training.captured import Inputs
from spatspark_fast.training.module import PlannedTraining, compile_parts
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.statistics import enough_values

__all__ = ["ForecastTraining", "begin_norms"]


SETTLED = 200  # batches after which nothing is left of the 1 that variances begin with: 0.9 ** 200 = 7e-10


@torch.no_grad()
def begin_norms(model: Forecaster, frames: Tensor) -> None:
    """Set running statistics that have seen little to those of ``frames`` ``(B, in_length, H, W)``.

    Rain in data units is small, so that variances of the first layers lie far below the 1 that batch norms begin
    with: left alone, they would spoil forecasts in evaluation mode for the first hundreds of steps.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    fresh = [m for m in norms if m.num_batches_tracked is not None and int(m.num_batches_tracked) < SETTLED]
    momenta = [module.momentum for module in fresh]
    others = {name: value.clone() for name, value in model.named_buffers()}
    for module in fresh:
        module.momentum = 1.0
    with enough_values(len(frames)):
        model(frames)
    for module, momentum in zip(fresh, momenta, strict=True):
        module.momentum = momentum
    ours = {id(buffer) for module in fresh for buffer in module.buffers()}
    for name, buffer in model.named_buffers():
        if id(buffer) not in ours:
            buffer.copy_(others[name])


class ForecastTraining(PlannedTraining[Forecaster]):
    """Train a `Forecaster` on stacks of past and future.

    ``scale`` is mm per 5 min of data value 1.
    """

    def __init__(self, config: FinetuneConfig, model: Forecaster, scale: float, plan: Plan) -> None:
        super().__init__(config.optim, config.trainer.seed, plan)
        self.config = config
        self.model = model
        self.scale = scale
        self.criterion = ForecastLoss(
            scale, config.loss.ssim_weight, config.loss.weighting, config.loss.spectral_weight
        )
        self.ema = averaged(model, config.optim.ema)
        compile_parts((model,), config.trainer.compile)

    @property
    def trained(self) -> Forecaster:
        """Return the model whose weights are trained."""
        return self.model

    def inputs(self, batch: dict[str, Any]) -> Inputs:
        """Return the frames of a batch."""
        return Inputs(batch["input"])

    def loss(self, frames: Tensor, noise: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
        """Return the loss of one batch ``(B, T_in + T_out, H, W)``, NaN where the future is unknown."""
        past, future = frames[:, : self.model.in_length], frames[:, self.model.in_length :]
        with enough_values(len(frames)):
            return self.criterion(self.model(past), future)

    def description(self) -> dict[str, Any]:
        """Say as plain values how to build the model again."""
        kind, options = forecaster_options(self.config, self.scale)
        lengths = self.model.in_length, self.model.out_length
        return describe_forecaster(forecaster_name(self.config), kind, *lengths, self.scale, options)

    def exported(self) -> dict[str, Any]:
        """Return a checkpoint that only forecasts: the kept weights on the CPU, options, description."""
        state = {PREFIX + name: value.detach().cpu() for name, value in self.kept.state_dict().items()}
        return {DESCRIPTION: self.description(), "config": to_plain(self.config), "state_dict": state}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the options and the description."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = to_plain(self.config)
        checkpoint[DESCRIPTION] = self.description()
