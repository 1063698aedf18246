"""What a GPU run costs the host, counted and timed on a fake card: launches, operators, microseconds.

Counts are of hollow tensors at real sizes and say the same in every run. Times are of tiny tensors, whose operators
PyTorch computes on the host; kernels of this project are prepared and not started. They are the host's alone, and only
their ratio to another version's on the same machine means anything.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor

from patchsparse import PatchGrid, patch_conv2d
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.models.spark import SparK, build_spark
from spatspark_fast.training.lamb import Lamb, clip_gradients
from spatspark_fast.training.optim import parameter_groups, set_rates

from .fake import Seen, fake_gpu

__all__ = ["DECODERS", "Cost", "costs", "counted_conv", "counted_step", "timed_conv", "timed_step"]

DECODERS = {"unet": 768, "light": 512}  # and their width
THIN = (16, 32, 48, 64)  # channels of an encoder whose weights cost the host nothing
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Cost:
    """One figure; ``unit`` is ``"launches"``, ``"us"`` or ``"ms"``."""

    what: str
    value: float
    unit: str


class Training:
    """Steps of pretraining, as `python -m spatspark_fast.pretrain` takes them, on frames that are there."""

    def __init__(self, decoder: str, width: int, frames: Tensor):
        self.model: SparK = build_spark("resnet18", decoder=decoder, decoder_width=width).to("cuda").train()  # type: ignore[arg-type]
        self.frames = frames
        self.masks = MaskSampler(ratio=0.6)
        self.optimizer = Lamb(parameter_groups(self.model.named_parameters()))
        set_rates(self.optimizer.param_groups, 2e-4, 0.04)
        self.position = 0

    def mask(self) -> PatchGrid:
        """Return the grid of the next step."""
        self.position += 1
        return self.masks(self.frames, step=self.position)

    def learn(self, grid: PatchGrid) -> None:
        """Run forward and backward passes."""
        with torch.autocast("cuda", dtype=BFLOAT16):
            loss = self.model(self.frames, grid).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def update(self) -> None:
        """Clip the gradients and move the weights."""
        clip_gradients(self.model.parameters(), 5.0)
        self.optimizer.step()

    def __call__(self) -> None:
        """Train one step."""
        self.learn(self.mask())
        self.update()


@contextmanager
def _counting(seen: Seen, found: Counter[str]) -> Iterator[None]:
    """Add what is started inside the ``with`` block: kernels of Triton and operators of PyTorch."""
    kernels, operators = seen.launches.total(), seen.operators.total()
    yield
    found["kernels"] += seen.launches.total() - kernels
    found["operators"] += seen.operators.total() - operators


def counted_step(decoder: str, batch: int = 128, size: int = 288) -> list[Cost]:
    """Return what a step of a ResNet-18 starts on the card, and what of it a new mask, clipping and LAMB do."""
    name = f"step of a ResNet-18, {decoder} decoder"
    with fake_gpu("h100", hollow=True, compiles=False) as seen:
        training = Training(decoder, DECODERS[decoder], torch.empty(batch, 12, size, size, device="cuda"))
        training()
        drawn, fresh, again, updated = (Counter[str]() for _ in range(4))
        with _counting(seen, drawn):
            grid = training.mask()
        for found in (fresh, again):  # the second time all tables of the mask are there
            with _counting(seen, found):
                training.learn(grid)
        with _counting(seen, updated):
            training.update()
    whole = drawn + fresh + updated
    return [
        Cost(f"{name}: launches", whole.total(), "launches"),
        Cost(f"{name}: of these, kernels of this project", whole["kernels"], "launches"),
        Cost(f"{name}: of these, for a new mask", (drawn + fresh).total() - again.total(), "launches"),
        Cost(f"{name}: of these, clipping and LAMB", updated.total(), "launches"),
    ]


def counted_conv() -> list[Cost]:
    """Return what the three passes of a 3x3 convolution start, after their tables were made."""
    with fake_gpu("h100", hollow=True, compiles=False) as seen:
        run = _conv(128)[3]
        run()
        found = Counter[str]()
        with _counting(seen, found):
            run()
    return [Cost("3x3 convolution, C64, p8, forward and backward: launches", found.total(), "launches")]


def _conv(images: int) -> tuple[Callable[[], object], ...]:
    """Return functions that run forward, forward and input gradient, forward and weight gradient, and all three."""
    grid = PatchGrid.random(images, (9, 9), 0.4, generator=torch.Generator("cuda").manual_seed(0))
    x = torch.randn(grid.num_active, 64, 8, 8, device="cuda", dtype=BFLOAT16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device="cuda", dtype=BFLOAT16).contiguous(memory_format=torch.channels_last)
    g = torch.empty_like(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return patch_conv2d(x, w, None, grid, 1, 1)

    def both(leaves: list[Tensor]) -> Any:
        for leaf in (x, w):
            leaf.requires_grad_(any(leaf is one for one in leaves))
        return torch.autograd.grad(patch_conv2d(x, w, None, grid, 1, 1), leaves, g)

    return forward, lambda: both([x]), lambda: both([w]), lambda: both([x, w])


def timed_conv(repetitions: int = 400) -> list[Cost]:
    """Return microseconds of the host for one convolution: of its passes, and of all three in turn."""
    with fake_gpu("h100", compiles=False):
        forward, dgrad, wgrad, all_three = (_median(run, repetitions) * 1e6 for run in _conv(1))
    name = "3x3 convolution, eager"
    return [
        Cost(f"{name}: forward, dgrad, wgrad", all_three, "us"),
        Cost(f"{name}: forward, no gradients", forward, "us"),
        Cost(f"{name}: forward and dgrad", dgrad, "us"),
        Cost(f"{name}: forward and wgrad", wgrad, "us"),
    ]


def timed_step(decoder: str, repetitions: int = 20) -> list[Cost]:
    """Return milliseconds of the host for an eager step of a thin ResNet-18 on two small images."""
    thin = functools.partial(timm.create_model, channels=THIN)
    with fake_gpu("h100", compiles=False), mock.patch.object(timm, "create_model", thin):
        training = Training(decoder, 32, torch.rand(2, 12, 64, 64, device="cuda"))
        seconds = _median(training, repetitions)
    return [Cost(f"step of a thin ResNet-18, {decoder} decoder, eager", 1e3 * seconds, "ms")]


def _median(run: Callable[[], object], repetitions: int) -> float:
    """Return the median processor seconds of a call, after a quarter of so many calls; others may keep it waiting."""
    for _ in range(max(2, repetitions // 4)):
        run()
    seconds = []
    for _ in range(repetitions):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def costs() -> list[Cost]:
    """Return all figures."""
    found = [*timed_conv(), *counted_conv()]
    for decoder in DECODERS:
        found += [*counted_step(decoder), *timed_step(decoder)]
    return found
