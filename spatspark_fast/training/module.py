"""The pretraining step as a Lightning module: every random choice follows from (seed, position) alone."""

import math
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spatspark_fast.config import PretrainConfig, to_plain
from spatspark_fast.errors import UserError
from spatspark_fast.masks import MaskSampler
from spatspark_fast.models.spark import SparK
from spatspark_fast.training.optim import build_optimizer, set_rates
from spatspark_fast.training.schedules import Plan

__all__ = ["SparkPretraining", "step_seed"]

_STEP_STREAM = 3  # masks use the streams 0 and 1 of a seed, the data order 2


def step_seed(seed: int, position: int, rank: int) -> int:
    """Return the seed of the global generators (drop-path, dropout) for the batch at a position."""
    return int(np.random.SeedSequence((_STEP_STREAM, seed, position, rank)).generate_state(1, np.uint64)[0])


class SparkPretraining(L.LightningModule):
    """Train a `SparK` model: rates and masks by position, clipped gradients, an average of the weights.

    ``last`` holds what the newest step is worth logging: the detached loss, and the norm of the gradient.
    """

    def __init__(self, config: PretrainConfig, spark: SparK, masks: MaskSampler, plan: Plan) -> None:
        super().__init__()
        self.config = config
        self.spark = spark
        self.masks = masks
        self.plan = plan
        self.ema: AveragedModel | None = None
        if config.optim.ema > 0:
            self.ema = AveragedModel(spark, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema), use_buffers=True)
            self.ema.requires_grad_(False)
        self.last: dict[str, Tensor] = {}
        self.position = -1
        self._broken: Tensor | None = None

    @property
    def best_spark(self) -> SparK:
        """Return the model to keep: the averaged one, where there is one."""
        if self.ema is None:
            return self.spark
        module = self.ema.module
        if not isinstance(module, SparK):
            raise TypeError(f"the averaged model is a {type(module).__name__}, not a SparK")
        return module

    @property
    def epochs_done(self) -> float:
        """Return passes over the data up to and with the newest batch."""
        return (self.position + 1) / self.plan.batches_per_epoch

    @property
    def epoch_complete(self) -> bool:
        """Tell whether the newest batch was the last of its epoch."""
        return (self.position + 1) % self.plan.batches_per_epoch == 0

    @property
    def between_steps(self) -> bool:
        """Tell whether no gradient waits for an optimiser step, so that a checkpoint is complete."""
        in_epoch = (self.position + 1) % self.plan.batches_per_epoch
        return in_epoch % self.plan.accumulate == 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser of the model's own parameters."""
        return build_optimizer(self.spark.named_parameters(), self.config.optim, self.plan.peak_lr)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Set the rates of this step, and the global generators."""
        self.position = int(batch["position"])
        step = self.plan.step_of(self.position)
        set_rates(self.optimizer.param_groups, self.plan.lr(step), self.plan.wd(step))
        torch.manual_seed(step_seed(self.config.trainer.seed, self.position, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch under the masks of its position."""
        frames = batch["input"]
        progress = self.plan.progress(self.plan.step_of(self.position))
        grid = self.masks(frames, step=self.position, progress=progress, rank=self.global_rank)
        loss = self.spark(frames, grid).loss
        self.last["loss"] = loss.detach()
        broken = ~loss.detach().isfinite()
        self._broken = broken if self._broken is None else self._broken | broken
        if loss.device.type == "cpu":  # on a GPU this would wait for the device at every step
            self.check_finite()
        return loss

    def check_finite(self) -> None:
        """Raise `UserError` if a loss since the start was NaN or infinite."""
        if self._broken is not None and bool(self._broken):
            step = self.plan.step_of(self.position)
            raise UserError(
                f"the loss is no longer finite at step {step} (epoch {self.epochs_done:.2f}): lower "
                "--optim.base_lr or --optim.clip, take --trainer.precision fp32, or look for odd values in "
                "the data; the last checkpoint is from before and stays"
            )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the one optimiser."""
        return self.trainer.optimizers[0]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip the norm of the whole gradient, and keep the norm for the log."""
        limit = self.config.optim.clip or math.inf
        self.last["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.spark.parameters(), limit).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.spark)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the options and the position, as plain values."""
        checkpoint["config"] = to_plain(self.config)
        checkpoint["position"] = self.position + 1
        checkpoint["batches_per_epoch"] = self.plan.batches_per_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the position of the checkpoint."""
        self.position = int(checkpoint["position"]) - 1
