"""What all trainings have in common: a plan, a place in it, and nothing random that does not follow from that place."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from spatspark_fast.common.errors import UserError
from spatspark_fast.training.average import MovingAverage
from spatspark_fast.training.captured import CapturedStep, Graphs, Inputs
from spatspark_fast.training.device_rates import Movable, on_cpu
from spatspark_fast.training.lamb import clip_gradients
from spatspark_fast.training.optim import build_optimizer, set_rates
from spatspark_fast.training.options import Compile, OptimOptions
from spatspark_fast.training.schedules import Plan

__all__ = ["PlannedTraining", "compile_parts", "step_seed"]

_STEP_STREAM = 3  # masks use the streams 0 and 1 of a seed, the data order 2


def step_seed(seed: int, position: int, rank: int) -> int:
    """Return the seed of the global generators (drop-path, dropout) for the batch at a position."""
    return int(np.random.SeedSequence((_STEP_STREAM, seed, position, rank)).generate_state(1, np.uint64)[0])


Model = TypeVar("Model", bound=nn.Module)


def compile_parts(parts: Sequence[nn.Module], mode: Compile) -> None:
    """Compile modules in place, so that the keys of their weights stay."""
    if mode != "off":
        for part in parts:
            # torch.compile's own CUDA graphs would lie within those of whole steps.
            part.compile(mode="max-autotune-no-cudagraphs" if mode == "max-autotune" else mode)


class PlannedTraining(L.LightningModule, Generic[Model]):
    """Set the rates of each step by its position in a `Plan`, clip gradients, average weights, watch the loss.

    ``last`` holds what the newest step has to log: the detached loss, and the norm of the gradient. The trained
    model is `trained`, its average is ``ema``. With ``graphs`` a whole step is captured once and then replayed: its
    results are in place when `training_step` returns, and Lightning's backward pass, clipping and optimiser step are
    left out. ``say`` is told of it. ``data`` marks the windows (`samedata`), for a run that goes on.
    """

    def __init__(self, optim: OptimOptions, seed: int, plan: Plan) -> None:
        super().__init__()
        self.optim = optim
        self.seed = seed
        self.plan = plan
        self.ema: MovingAverage | None = None
        self.graphs: Graphs | None = None
        self.say: Callable[[str], None] = lambda text: None
        self.captured: CapturedStep | None = None
        self.last: dict[str, Tensor] = {}
        self.data: dict[str, Any] = {}
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
    def _begins(self) -> bool:
        """Tell whether the newest batch is the first of an optimiser step."""
        return self.position % self.plan.batches_per_epoch % self.plan.accumulate == 0

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

    def inputs(self, batch: dict[str, Any]) -> Inputs:
        """Return what the newest batch gives to its step."""
        raise NotImplementedError

    def loss(self, frames: Tensor, noise: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
        """Return the loss of `Inputs`, of which the ``noise`` has come to the device."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Capture steps from here on, if asked for."""
        if self.graphs is not None:
            self.captured = CapturedStep(
                self.trained,
                lambda *inputs: self.watch(self.loss(*inputs)),
                cast(Movable, self.optimizer),
                self.graphs,
                clip=self.optim.clip or None,
                average=self.ema,
                accumulate=self.plan.accumulate,
                say=self.say,
            )

    def on_train_end(self) -> None:
        """Give the memory of captured steps back."""
        self.captured = None

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Set the rates of this step, and the global generators."""
        self.position = int(batch["position"])
        if self.captured is not None and self.captured.given_up and self._begins:
            self.captured = None
        step = self.plan.step_of(self.position)
        set_rates(self.optimizer.param_groups, self.plan.lr(step), self.plan.wd(step))
        torch.manual_seed(step_seed(self.seed, self.position, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch; where steps are captured, take the whole step."""
        inputs = self.inputs(batch)
        if self.captured is None:
            frames, noise = inputs.frames, inputs.noise
            sent = [numbers.to(frames.device, non_blocking=True) for numbers in noise]
            return self.watch(self.loss(frames, sent, inputs.counts))
        taken = self.captured(inputs, self._begins, self.between_steps)
        self.last["loss"] = taken.loss
        if taken.norm is not None:
            self.last["grad_norm"] = taken.norm
        return taken.loss

    def watch(self, loss: Tensor) -> Tensor:
        """Keep the loss for the log and see that it is finite; return it."""
        self.last["loss"] = loss.detach()
        if self._broken is None:
            self._broken = torch.zeros_like(loss, dtype=torch.bool)
        self._broken.logical_or_(~loss.detach().isfinite())
        if on_cpu(loss):  # on a GPU this would wait for the device at every step
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

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, which a captured step has done already."""
        if self.captured is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Forget the gradients; a captured step keeps them where it needs them."""
        if self.captured is None:
            super().optimizer_zero_grad(*args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip the norm of the whole gradient, and keep the norm for the log."""
        self.last["grad_norm"] = clip_gradients(self.trained.parameters(), self.optim.clip or None)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then move the average; a captured step is taken by the closure alone."""
        if self.captured is not None:
            if optimizer_closure is not None:
                optimizer_closure()
            return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update_parameters(self.trained)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position and what tells the data, as plain values."""
        checkpoint["position"] = self.position + 1
        checkpoint["batches_per_epoch"] = self.plan.batches_per_epoch
        checkpoint["data"] = self.data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the position of the checkpoint."""
        self.position = int(checkpoint["position"]) - 1
