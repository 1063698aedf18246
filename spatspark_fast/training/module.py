"""What all trainings have in common: a plan, a place in it, and nothing random that does not follow from that place."""

from typing import Any, Generic, TypeVar, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spatspark_fast.common.errors import UserError
from spatspark_fast.training.lamb import clip_gradients
from spatspark_fast.training.optim import build_optimizer, set_rates
from spatspark_fast.training.options import OptimOptions
from spatspark_fast.training.schedules import Plan

__all__ = ["PlannedTraining", "averaged", "step_seed"]

_STEP_STREAM = 3  # masks use the streams 0 and 1 of a seed, the data order 2


def step_seed(seed: int, position: int, rank: int) -> int:
    """Return the seed of the global generators (drop-path, dropout) for the batch at a position."""
    return int(np.random.SeedSequence((_STEP_STREAM, seed, position, rank)).generate_state(1, np.uint64)[0])


Model = TypeVar("Model", bound=nn.Module)


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return an exponential moving average of the weights and buffers of a model; None for decay 0."""
    if decay <= 0:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.requires_grad_(False)
    return average


class PlannedTraining(L.LightningModule, Generic[Model]):
    """Set the rates of each step by its position in a `Plan`, clip gradients, average weights, watch the loss.

    ``last`` holds what the newest step has to log: the detached loss, and the norm of the gradient. The trained
    model is `trained`, its average is ``ema``.
    """

    def __init__(self, optim: OptimOptions, seed: int, plan: Plan) -> None:
        super().__init__()
        self.optim = optim
        self.seed = seed
        self.plan = plan
        self.ema: AveragedModel | None = None
        self.last: dict[str, Tensor] = {}
        self.position = -1
        self._broken: Tensor | None = None

    @property
    def trained(self) -> Model:
        """Return the model whose weights are trained."""
        raise NotImplementedError

    @property
    def kept(self) -> Model:
        """Return the model to keep: the averaged one, where there is one."""
        return self.trained if self.ema is None else cast(Model, self.ema.module)

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

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the one optimiser."""
        return self.trainer.optimizers[0]

    def extra_row(self) -> dict[str, float | Tensor]:
        """Return further columns of a row of metrics.csv; scalars on a device stay there, so that nobody waits."""
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser of the model's own parameters, without the frozen ones."""
        return build_optimizer(self.trained.named_parameters(), self.optim, self.plan.peak_lr)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Set the rates of this step, and the global generators."""
        self.position = int(batch["position"])
        step = self.plan.step_of(self.position)
        set_rates(self.optimizer.param_groups, self.plan.lr(step), self.plan.wd(step))
        torch.manual_seed(step_seed(self.seed, self.position, self.global_rank))

    def watch(self, loss: Tensor) -> Tensor:
        """Keep the loss for the log and see that it is finite; return it."""
        self.last["loss"] = loss.detach()
        broken = ~loss.detach().isfinite()
        self._broken = broken if self._broken is None else self._broken | broken
        if loss.device.type == "cpu":  # on a GPU this would wait for the device at every step
            self.check_finite()
        return loss

    @property
    def broken(self) -> Tensor | float:
        """Tell, as a bool on the device, whether a loss since the start was NaN or infinite."""
        return 0.0 if self._broken is None else self._broken

    def check_finite(self) -> None:
        """Raise `UserError` if a loss since the start was NaN or infinite."""
        if self._broken is not None and bool(self._broken):
            step = self.plan.step_of(self.position)
            raise UserError(
                f"the loss is no longer finite at step {step} (epoch {self.epochs_done:.2f}): lower "
                "--optim.base_lr or --optim.clip, take --trainer.precision fp32, or look for odd values in "
                "the data; the last checkpoint is from before and stays"
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip the norm of the whole gradient, and keep the norm for the log."""
        self.last["grad_norm"] = clip_gradients(self.trained.parameters(), self.optim.clip or None)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.trained)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position, as plain values."""
        checkpoint["position"] = self.position + 1
        checkpoint["batches_per_epoch"] = self.plan.batches_per_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the position of the checkpoint."""
        self.position = int(checkpoint["position"]) - 1
