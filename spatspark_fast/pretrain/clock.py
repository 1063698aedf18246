"""Tell how a training step spends its time, part by part, without ever waiting for the device.

On a GPU a mark is an event in its queue, and what lies between two of them is read when both have long passed; on a
CPU it is the time of day. The parts follow each other in a step like this::

    data | pack, encoder | densify, decoder, loss | backward of these | backward of the encoder | clip, optimiser
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from spatspark_fast.models.spark import SparK
from spatspark_fast.training.stream import BatchStream

__all__ = ["PARTS", "Lap", "StepClock"]

PARTS: tuple[str, ...] = ("data", "encoder", "decoder", "optimiser", "other")


class _Mark(NamedTuple):
    """Hold a moment, and which part ended there."""

    part: str
    moment: Any  # a torch.cuda.Event, or seconds


class Lap:
    """Hold the marks of some steps in a row."""

    def __init__(self, marks: Sequence[_Mark]) -> None:
        self._marks = marks

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each of `PARTS`; on a GPU only once it has passed the last mark."""
        found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for before, after in zip(self._marks, self._marks[1:], strict=False):
            found[after.part] += _between(before.moment, after.moment)
        return found


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class StepClock(L.Callback):
    """Mark the parts of each step of a `SparK` model. Place it before the callbacks that read it."""

    def __init__(self) -> None:
        self._cuda = False
        self._running = False
        self._marks: list[_Mark] = []
        self._hook: Any = None
        self._spark: SparK | None = None

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
        self._listen(pl_module.spark)
        self._running = True
        self._marks = []
        self.mark("other")

    def _listen(self, spark: SparK) -> None:
        # A hook of the encoder would become part of a compiled one; a method of the model does not.
        encode = spark.encode

        def timed(*args: Any) -> list[Tensor]:
            features = encode(*args)
            if self._running and torch.is_grad_enabled():
                self.mark("encoder")
                # The decoder reads aliases: the gradients of the features themselves wait for the deeper stages too.
                features = [feature.view_as(feature) for feature in features]
                for feature in features:
                    if feature.requires_grad:  # the last gradient that arrives ends the decoder's backward pass
                        feature.register_hook(lambda gradient: self.mark("decoder"))
            return features

        self._spark = spark
        spark.encode = timed  # type: ignore[method-assign]
        self._hook = spark.register_forward_pre_hook(lambda module, inputs: self.mark("other"))

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """End the forward pass."""
        self.mark("decoder")

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """End the backward pass."""
        self.mark("encoder")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step."""
        self.mark("optimiser" if pl_module.between_steps or pl_module.epoch_complete else "other")

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
            del self._spark.encode  # the method of the class shows again
        self._hook.remove()
        stream = trainer.train_dataloader
        if isinstance(stream, BatchStream):
            stream.mark = None
