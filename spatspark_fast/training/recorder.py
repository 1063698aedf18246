"""Sum up a training in rows: the loss, the rates, images/s, and where the time went."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import lightning as L
from torch import Tensor

from spatspark_fast.training.module import PlannedTraining
from spatspark_fast.training.reading import Reading
from spatspark_fast.training.speed import Speed
from spatspark_fast.training.stream import BatchStream

__all__ = ["Clock", "Lap", "Recorder"]


class Lap(Protocol):
    """Say what a recorder must know of the time that some steps took."""

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part of the steps; those of "data" were spent waiting for it."""
        ...


class Clock(Protocol):
    """Say what a recorder needs to tell the parts of a step apart."""

    def lap(self) -> Lap:
        """Return the time since the last lap."""
        ...


class Recorder(L.Callback):
    """Log a row every so many optimiser steps: loss over them, rates, images/s, and where the time went.

    Nothing waits for the device: a row is written when its numbers have arrived, on a GPU some steps later,
    and at the latest when a checkpoint is saved or training ends. With a ``clock`` the shares of the parts of
    a step are part of it. ``newest`` is the last row. The half-filled row is part of a checkpoint, so a
    resumed run writes the same rows.
    """

    def __init__(self, every: int, clock: Clock | None = None) -> None:
        self.every = every
        self.clock = clock
        self.newest: dict[str, float] = {}
        self.speed = Speed()
        self._sum: Tensor | float = 0.0
        self._batches = 0
        self._epoch_sum: Tensor | float = 0.0
        self._epoch_batches = 0
        self._first_sum: Tensor | float = 0.0
        self._first_batches = 0
        self._timed = 0
        self._since = 0.0
        self._pending: deque[_Row] = deque()
        self._write_all: Callable[[], None] = lambda: None

    def state_dict(self) -> dict[str, Any]:
        """Return the half-filled row; the full ones are written."""
        self._write_all()
        return {
            "sum": float(self._sum),
            "batches": self._batches,
            "epoch_sum": float(self._epoch_sum),
            "epoch_batches": self._epoch_batches,
            "first_sum": float(self._first_sum),
            "first_batches": self._first_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a half-filled row."""
        self._sum, self._batches = state_dict["sum"], state_dict["batches"]
        self._epoch_sum, self._epoch_batches = state_dict["epoch_sum"], state_dict["epoch_batches"]
        self._first_sum, self._first_batches = state_dict["first_sum"], state_dict["first_batches"]

    @property
    def first_loss(self) -> float:
        """Return the mean loss of the first epoch; NaN before any batch."""
        return float(self._first_sum) / self._first_batches if self._first_batches else float("nan")

    @property
    def epoch_loss(self) -> float:
        """Return the mean loss since the current epoch began, of the last one at its end; NaN before any batch."""
        return float(self._epoch_sum) / self._epoch_batches if self._epoch_batches else float("nan")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._write_all = lambda: self._write(trainer, pl_module, wait=True)
        self._restart_clock(_stream_of(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write what is still on its way."""
        self._write_all()
        self._write_all = lambda: None

    def _restart_clock(self, stream: BatchStream) -> None:
        self._since = time.perf_counter()
        stream.waited = 0.0
        self._timed = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the batch to the row; close the row when it is full; write rows that are ready."""
        module: PlannedTraining[Any] = pl_module
        if module.position % module.plan.batches_per_epoch == 0:
            self._epoch_sum, self._epoch_batches = 0.0, 0
        loss = module.last["loss"].double()
        self._sum, self._epoch_sum = self._sum + loss, self._epoch_sum + loss
        self._batches += 1
        self._epoch_batches += 1
        if module.position < module.plan.batches_per_epoch:
            self._first_sum, self._first_batches = self._epoch_sum, self._epoch_batches
        self._timed += 1
        ends_step = module.between_steps or module.epoch_complete
        step = trainer.global_step
        if ends_step and (step % self.every == 0 or step >= module.plan.total_steps):
            self._close(trainer, module, step)
        self._write(trainer, module, wait=False)

    def _close(self, trainer: L.Trainer, module: PlannedTraining[Any], step: int) -> None:
        """Take the row off; its numbers on a device are copied when the device gets there."""
        stream = _stream_of(trainer)
        taken = module.plan.step_of(module.position)
        reading = Reading(
            {
                "epoch": module.epochs_done,
                "loss": self._sum / self._batches,
                "lr": module.plan.lr(taken),
                "weight_decay": module.plan.wd(taken),
                **module.extra_row(),
                "grad_norm": module.last["grad_norm"],
                "broken": module.broken,
            }
        )
        windows = self._timed * stream.batch_size * stream.world_size
        seconds = max(time.perf_counter() - self._since, 1e-9)
        lap = None if self.clock is None else self.clock.lap()
        self._pending.append(_Row(step, reading, windows, seconds, stream.waited, lap))
        self._sum, self._batches = 0.0, 0
        self._restart_clock(stream)

    def _write(self, trainer: L.Trainer, module: PlannedTraining[Any], wait: bool) -> None:
        while self._pending and (wait or self._pending[0].reading.ready()):
            row = self._pending.popleft()
            values = row.reading.get()
            if values.pop("broken"):
                module.check_finite()
            self.newest = {**values, **self.speed.add(row.windows, row.parts())}
            for logger in trainer.loggers:
                logger.log_metrics(self.newest, row.step)


class _Row(NamedTuple):
    """Hold a row whose numbers may still be on their way."""

    step: int
    reading: Reading
    windows: int
    seconds: float
    waited: float
    lap: Lap | None

    def parts(self) -> dict[str, float]:
        """Return seconds by part; without a clock, those of waiting for data and all others."""
        if self.lap is not None:
            return self.lap.seconds()
        return {"data": self.waited, "other": max(self.seconds - self.waited, 0.0)}


def _stream_of(trainer: L.Trainer) -> BatchStream:
    stream = trainer.train_dataloader
    if not isinstance(stream, BatchStream):
        raise TypeError(f"the recorder reads its times off a BatchStream, got {type(stream).__name__}")
    return stream
