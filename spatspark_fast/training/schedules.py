"""Schedules as pure functions of the optimiser step: learning rate, weight decay, warm-up length."""

import math
from dataclasses import dataclass

__all__ = ["Plan", "cosine", "make_plan", "scaled_lr", "warmup_cosine"]

FIRST_LR = 0.005  # warm-up starts at this share of the peak, as in SparK's published code
LONGEST_WARMUP = 0.25  # of the training; more would leave no time at the peak when a run is cut short


def cosine(start: float, end: float, progress: float) -> float:
    """Go from ``start`` (progress 0) to ``end`` (progress 1) along half a cosine; stay at the ends outside."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(step: int, peak: float, warmup: float, total: int, final: float) -> float:
    """Return the learning rate of a step: a line up to ``peak``, then half a cosine down to ``final * peak``.

    The line takes ``warmup`` steps. ``step`` counts from 0 to ``total - 1``, and the last step has exactly the final
    rate. Source: SparK's `lr_wd_annealing` (arXiv 2301.03580).
    """
    if step < warmup:
        return peak * (FIRST_LR + (1.0 - FIRST_LR) * step / warmup)
    return cosine(peak, final * peak, (step - warmup) / max(total - 1 - warmup, 1.0))


def scaled_lr(base_lr: float, windows_per_step: int) -> float:
    """Scale the base rate, which is meant for 256 windows, to the windows of one optimiser step."""
    return base_lr * windows_per_step / 256


@dataclass(frozen=True)
class Plan:
    """Hold the lengths of a run, in batches and optimiser steps, and its peak learning rate."""

    batches_per_epoch: int
    accumulate: int
    total_steps: int
    warmup_steps: float
    peak_lr: float
    final_lr: float
    weight_decay: float
    weight_decay_end: float

    @property
    def steps_per_epoch(self) -> int:
        """Return optimiser steps per epoch; the last one may accumulate fewer batches."""
        return math.ceil(self.batches_per_epoch / self.accumulate)

    @property
    def epochs(self) -> int:
        """Return the number of epochs that are begun."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def step_of(self, position: int) -> int:
        """Return the optimiser step of the batch at ``position``, counted from the start."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        return epoch * self.steps_per_epoch + batch // self.accumulate

    def progress(self, step: int) -> float:
        """Return how far training is, 0 at the first and 1 at the last step."""
        return step / max(self.total_steps - 1, 1)

    def lr(self, step: int) -> float:
        """Return the learning rate of an optimiser step."""
        return warmup_cosine(step, self.peak_lr, self.warmup_steps, self.total_steps, self.final_lr)

    def wd(self, step: int) -> float:
        """Return the weight decay of an optimiser step."""
        return cosine(self.weight_decay, self.weight_decay_end, self.progress(step))


def make_plan(
    *,
    batches_per_epoch: int,
    epochs: int,
    max_steps: int | None,
    accumulate: int,
    warmup_epochs: float,
    windows_per_batch: int,
    base_lr: float,
    final_lr: float,
    weight_decay: float,
    weight_decay_end: float,
) -> Plan:
    """Work out the lengths of a run; warm-up takes at most a quarter of it."""
    steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
    total = epochs * steps_per_epoch
    if max_steps is not None:
        total = min(total, max_steps)
    return Plan(
        batches_per_epoch=batches_per_epoch,
        accumulate=accumulate,
        total_steps=total,
        warmup_steps=min(warmup_epochs * steps_per_epoch, LONGEST_WARMUP * total),
        peak_lr=scaled_lr(base_lr, windows_per_batch * min(accumulate, batches_per_epoch)),
        final_lr=final_lr,
        weight_decay=weight_decay,
        weight_decay_end=weight_decay_end,
    )
