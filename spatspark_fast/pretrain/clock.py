"""Tell how a training step spends its time, part by part, without ever waiting for the device.

On a GPU a mark is an event in its queue, and what lies between two of them is read when both have long passed; on a
CPU it is the time of day. The parts follow each other in a step like this::

    data | pack, encoder | densify, decoder, loss | backward of these | backward of the encoder | clip, optimiser

A step that is one CUDA graph has no parts that one could see; then there is "data", and "step".
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from spatspark_fast.models.spark import Observer, SparK
from spatspark_fast.training.stream import BatchStream

__all__ = ["PARTS", "WHOLE", "Lap", "StepClock"]

PARTS = {"encoder": "encoder", "decoder": "densify, decoder and loss", "optimiser": "clipping and optimiser"}
"""The parts of a step in its order, and how a user is told of them. Beside them is "data", and "other"."""

WHOLE = "step"
"""The part that a step is which has been captured as a CUDA graph."""


class _Mark(NamedTuple):
    """Hold a moment, and which part ended there."""

    part: str
    moment: Any  # a torch.cuda.Event, or seconds


class Lap:
    """Hold the marks of some steps in a row."""

    def __init__(self, marks: Sequence[_Mark]) -> None:
        self._marks = marks

    def seconds(self) -> dict[str, float]:
        """Return the seconds of "data", of each of `PARTS` or of `WHOLE` steps, and of "other".

        On a GPU only once it has passed all marks.
        """
        whole = any(mark.part == WHOLE for mark in self._marks)
        found: dict[str, float] = dict.fromkeys(("data", WHOLE, "other") if whole else ("data", *PARTS, "other"), 0.0)
        for before, after in zip(self._marks, self._marks[1:], strict=False):
            found[after.part] = found.get(after.part, 0.0) + _between(before.moment, after.moment)
        return found


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class StepClock(L.Callback, Observer):
    """Mark the parts of each step of a `SparK` model. Place it before the callbacks that read it."""

    def __init__(self) -> None:
        self._cuda = False
        self._running = False
        self._marks: list[_Mark] = []
        self._spark: SparK | None = None
        self._module: Any = None

    def lap(self) -> Lap:
        """Return what was marked since the last lap, and begin the next one."""
        lap = Lap(self._marks)
        self._marks = self._marks[-1:]
        return lap

    def mark(self, part: str) -> None:
        """Say that ``part`` ends here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(_Mark(part, event))
        else:
            self._marks.append(_Mark(part, time.perf_counter()))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start, and listen to the stream of batches and to the model."""
        self._cuda = trainer.strategy.root_device.type == "cuda"
        stream = trainer.train_dataloader
        if isinstance(stream, BatchStream):
            stream.mark = self.mark
        self._module = pl_module
        spark: SparK = pl_module.spark
        spark.observer = self
        self._spark = spark
        self._running = True
        self._marks = []
        self.mark("other")

    @property
    def _whole(self) -> bool:
        """Whether steps are captured, so that a mark between their parts would be part of a graph."""
        return self._module.captured is not None

    def started(self) -> None:
        """Begin the forward pass."""
        if not self._whole:
            self.mark("other")

    def encoded(self, features: list[Tensor]) -> list[Tensor]:
        """End the encoder's forward pass, and find out when the decoder's backward pass ends."""
        if self._whole or not torch.is_grad_enabled():
            return features
        self.mark("encoder")
        # The decoder reads aliases: the gradients of the features themselves wait for the deeper stages too.
        aliases = [feature.view_as(feature) for feature in features]
        for alias in aliases:
            if alias.requires_grad:  # the last gradient that arrives ends the decoder's backward pass
                alias.register_hook(lambda gradient: self.mark("decoder"))
        return aliases

    def decoded(self) -> None:
        """End the forward pass of decoder and loss."""
        if not self._whole and torch.is_grad_enabled():
            self.mark("decoder")

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """End the backward pass."""
        if not self._whole:
            self.mark("encoder")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step."""
        ended = "optimiser" if pl_module.between_steps or pl_module.epoch_complete else "other"
        self.mark(WHOLE if self._whole else ended)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave the model as it was."""
        self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if not self._running:
            return
        self._running = False
        if self._spark is not None:
            self._spark.observer = Observer()
        stream = trainer.train_dataloader
        if isinstance(stream, BatchStream):
            stream.mark = None
