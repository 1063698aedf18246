"""Training steps of our own as replayed CUDA graphs, as ``--trainer.graph`` trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from spatspark_fast.models.masks import draw_masks, grids_of
from spatspark_fast.training.captured import CapturedStep, Graphs, Inputs
from spatspark_fast.training.cuda_graphs import CudaGraphs
from spatspark_fast.training.lamb import Lamb

from .steps import CLIP, Marks, OurStep, Step, no_mark

__all__ = ["GraphStep"]

WARM = 4  # steps until one is replayed: two kernel by kernel, the capture, the first replay


class GraphStep(Step):
    """Take the steps of `OurStep`, each with a new mask and captured whole: masks, passes, clipping, LAMB.

    Attributes:
        why_not: why steps are not captured after all, or None.
        held: bytes that the graph keeps, of which the activations are most.
    """

    def __init__(self, step: OurStep, graphs: Graphs | None = None) -> None:
        self.step = step
        self.model, self.optimizer, self.masks, self.frames = step.model, step.optimizer, step.masks, step.frames
        self.said: list[str] = []
        optimizer = cast(Lamb, step.optimizer)
        device = next(self.model.parameters()).device
        self.graphs = CudaGraphs(device) if graphs is None else graphs
        self.captured = CapturedStep(self.model, self._loss, optimizer, self.graphs, clip=CLIP, say=self.said.append)
        for _ in range(WARM):
            self()

    @property
    def why_not(self) -> str | None:
        """Return why steps are not captured, or None if they are."""
        captured = self.captured.replayed and not self.captured.given_up
        return None if captured else "; ".join(self.said) or "no step was captured"

    @property
    def held(self) -> int:
        """Return the bytes that the graph keeps."""
        return getattr(self.graphs, "held", 0)

    def __call__(self, marks: Marks = no_mark) -> Tensor:
        """Train one step; return its loss, which the next step writes over."""
        step = self.step
        step.position += 1
        frames = next(step.frames)
        draw = draw_masks(step.model, step.masks, tuple(frames.shape), step.decode_ratio, step.position)
        return self.captured(Inputs(frames, draw.noise, (draw.visible, *draw.decoded))).loss

    def _loss(self, frames: Tensor, noise: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
        visible, *decoded = counts
        step = self.step
        grids = grids_of(step.model, step.masks, frames, visible, decoded, noise)
        with torch.autocast(frames.device.type, dtype=step.precision, enabled=step.precision != torch.float32):
            return step.run(frames, *grids, no_mark)

    def loss(self, marks: Marks = no_mark) -> Tensor:
        """Return the loss of the next step, which is trained."""
        return self(marks)

    def run(self, frames: Tensor, grid, decoded, marks: Marks) -> Tensor:
        """Return the loss of ``frames`` without a graph."""
        return self.step.run(frames, grid, decoded, marks)

    def clip(self) -> None:
        """Do nothing: the graph clips."""
