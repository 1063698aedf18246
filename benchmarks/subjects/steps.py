"""Whole training steps to compare: data, forward, backward, clipping and LAMB; what they share, and ours."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from patchsparse import PatchGrid
from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.resident.places import Place, place_windows
from spatspark_fast.data.resident.store import WindowStore, in_memory
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import Observer, SparK, build_spark
from spatspark_fast.training.lamb import Lamb, clip_gradients
from spatspark_fast.training.optim import parameter_groups, set_rates

from ..measure.device import wait
from ..measure.timing import peak_bytes

__all__ = [
    "PARTS",
    "Marks",
    "OurStep",
    "Step",
    "build",
    "compiled",
    "no_mark",
    "peak",
    "split",
    "windows",
    "windows_on",
]

RATES = (2e-4, 0.04)  # learning rate and weight decay
BETAS, CLIP = (0.9, 0.95), 5.0
DRAWN = 4  # different windows of a batch
PARTS = ("data", "encoder", "decoder", "optimiser")  # backward passes included


class Marks(Protocol):
    """What a step calls where its parts end."""

    def __call__(self, part: str, features: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        """Note that ``part`` ends here; return the encoder's ``features`` for the decoder to read.

        What is returned are aliases: their gradient is the decoder's alone, while that of the features comes from
        deeper stages too.
        """
        ...


def no_mark(part: str, features: Sequence[Tensor] = ()) -> Sequence[Tensor]:
    """Return the features as they are, for a step that is timed as a whole."""
    return features


class _Marked(Observer):
    """Mark where the encoder ends; the step itself marks the end of the forward pass."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def encoded(self, features: list[Tensor]) -> list[Tensor]:
        return list(self.marks("encoder", features))


class Step(ABC):
    """Train one step at a time.

    Attributes:
        model: what is trained.
        optimizer: LAMB of the model's parameters.
        masks: what draws the visible patches.
        frames: the windows, as the step takes them.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    masks: MaskSampler
    frames: Any

    @abstractmethod
    def loss(self, marks: Marks = no_mark) -> Tensor:
        """Return the loss of the next step."""

    @abstractmethod
    def run(self, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None, marks: Marks) -> Tensor:
        """Return the loss of ``frames`` ``(B, T, H, W)``."""

    @abstractmethod
    def clip(self) -> None:
        """Clip the gradients."""

    def __call__(self, marks: Marks = no_mark) -> Tensor:
        """Train one step; return its loss."""
        loss = self.loss(marks)
        marks("decoder")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        marks("encoder")
        self.clip()
        self.optimizer.step()
        marks("optimiser")
        return loss.detach()


class OurStep(Step):
    """Step a `SparK` model as `python -m spatspark_fast.pretrain` does, from 16 bits a pixel to the new weights."""

    def __init__(
        self,
        model: SparK,
        place: Place,
        batch: int,
        masks: MaskSampler,
        decode_ratio: float = 1.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.train()
        self.masks = masks
        self.decode_ratio = decode_ratio
        self.precision = precision
        self.position = 0
        self.frames = _endless(place, batch)
        self.optimizer = Lamb(parameter_groups(model.named_parameters()), betas=BETAS)
        set_rates(self.optimizer.param_groups, *RATES)

    def loss(self, marks: Marks = no_mark) -> Tensor:
        """Return the loss of the next step."""
        self.position += 1
        frames = next(self.frames)
        grid, decoded = masks_of_step(self.model, self.masks, frames, self.decode_ratio, self.position)
        marks("data")
        with torch.autocast(frames.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            return self.run(frames, grid, decoded, marks)

    def run(self, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None, marks: Marks) -> Tensor:
        """Return the loss of ``frames`` ``(B, T, H, W)``."""
        self.model.observer = Observer() if marks is no_mark else _Marked(marks)
        return self.model(frames, grid, decoded).loss

    def clip(self) -> None:
        """Clip the gradients in fused operations."""
        clip_gradients(self.model.parameters(), CLIP)


def _endless(place: Place, batch: int) -> Iterator[Tensor]:
    keys = [(0, index) for index in range(batch)]
    while True:
        yield from place.batches([keys])


@cache
def windows(count: int, frames: int, size: int) -> WindowStore:
    """Return ``count`` windows of synthetic radar, 16 bits a pixel: `DRAWN` different ones, made once in a process.

    What a step costs does not depend on the rain, and making a window takes a CPU longer than a step takes a GPU.
    """
    drawn = in_memory(WholeWindows(SyntheticRadar(min(count, DRAWN), frames, 0, size)))
    return replace(drawn, codes=drawn.codes[np.arange(count) % DRAWN])


def windows_on(device: torch.device, batch: int, size: int, frames: int, augmentation: Augmentation) -> Place:
    """Return ``batch`` windows of synthetic radar in the memory of a device."""
    where = "host" if device.type == "cpu" else "device"
    return place_windows(windows(batch, frames, size), augmentation, where, device)


@cache
def _built(decoder: str, width: int, encoder: str, frames: int) -> SparK:
    torch.manual_seed(0)
    options: dict[str, Any] = {"decoder": decoder, "decoder_width": width, "in_chans": frames}
    return build_spark(encoder, **options)


def build(decoder: str, width: int, device: torch.device, encoder: str, frames: int) -> SparK:
    """Build a model of equal weights in every call, in channels_last memory; drawn once in a process."""
    return copy.deepcopy(_built(decoder, width, encoder, frames)).to(device)


def compiled(step: OurStep) -> OurStep:
    """Compile the parts of a step's model in place, as ``--trainer.compile default`` does."""
    for part in (step.model.encoder, step.model.densify, step.model.decoder):
        part.compile()
    return step


def peak(step: Step, device: torch.device) -> float:
    """Return the most MiB held at once during a step, above weights, moments and frames, which stay."""
    step()
    for parameter in step.model.parameters():
        parameter.grad = None
    return peak_bytes(step, device) / 2**20


def split(step: Callable[[Marks], object]) -> dict[str, float]:
    """Run one step and return the seconds of each of its `PARTS`; the device is waited for between them.

    The backward pass of decoder and densify ends when the last gradient of the encoder's features has arrived.
    """
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    since = _now()

    def mark(part: str, features: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        nonlocal since
        now = _now()
        found[part] += now - since
        since = now
        aliases = [feature.view_as(feature) for feature in features]
        for alias in aliases:
            if alias.requires_grad:
                alias.register_hook(decoded)
        return aliases

    def decoded(gradient: Tensor) -> None:
        mark("decoder")

    step(mark)
    return found


def _now() -> float:
    wait()
    return time.perf_counter()
