"""Estimate the peak memory of a training step without running it.

The step runs on fake tensors, which have shapes and no data, while every storage is counted from its birth to its
death: saved activations, gradients and what operators hand to each other. What an operator takes for itself while it
works (cuDNN's workspace, the buffers of the C++ engine) and what an allocator wastes is not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.spark import SparK

__all__ = ["StepMemory", "estimate_memory"]

SAMPLES = (8, 32)  # windows; the estimate is a line through both


class StepMemory(NamedTuple):
    """Hold the parts of the peak in bytes: the weights and all that belongs to them, and each window.

    ``weights`` are parameters and buffers, ``gradients`` theirs, ``optimiser`` LAMB's or AdamW's two moments.
    ``step`` is what forward and backward need even for the smallest batch. ``scratch`` is what the optimiser needs in
    addition, when activations are gone.
    """

    weights: int
    gradients: int
    optimiser: int
    scratch: int
    step: int
    window: int

    def peak(self, batch: int) -> int:
        """Return the largest number of bytes held at once in a step of ``batch`` windows."""
        kept = self.weights + self.optimiser
        return kept + max(self.step + batch * self.window, self.gradients + self.scratch)

    def largest_batch(self, budget: float) -> int:
        """Return the largest batch whose peak fits ``budget`` bytes; 0 if none does."""
        if self.peak(1) > budget:
            return 0
        return int((budget - self.weights - self.optimiser - self.step) // self.window)


def estimate_memory(
    model: SparK,
    size: tuple[int, int],
    mask_ratio: float,
    decode_ratio: float = 1.0,
    precision: torch.dtype = torch.float32,
    samples: Sequence[int] = SAMPLES,
) -> StepMemory:
    """Estimate the memory of training ``model`` on images of ``size`` (H, W) pixels; it is not touched.

    Convolutions that choose their way by the size of the batch choose as they would for ``samples`` windows.
    """
    ghost = copy.deepcopy(model).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = ghost.to_empty(device="cpu").train()
        values = [*model.parameters(), *model.buffers()]
        weights = sum(value.nbytes for value in values)
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        first, second = (_peak_of_step(model, batch, size, mask_ratio, decode_ratio, precision) for batch in samples)
    window = (second - first) // (samples[1] - samples[0])
    return StepMemory(weights, gradients, 2 * gradients, gradients, first - samples[0] * window, window)


def _peak_of_step(
    model: SparK,
    batch: int,
    size: tuple[int, int],
    mask_ratio: float,
    decode_ratio: float,
    precision: torch.dtype,
) -> int:
    """Return the largest number of bytes that a forward and backward pass holds above weights and moments."""
    model.zero_grad(set_to_none=True)
    masks = MaskSampler(ratio=mask_ratio, patch=model.patch)
    with _Tracker() as tracker:
        frames = torch.empty(batch, model.in_chans, *size)
        grid, decoded = masks_of_step(model, masks, frames, decode_ratio)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = model(frames, grid, decoded).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    return tracker.peak


class _Tracker(TorchDispatchMode):
    """Count the bytes of storages that are born inside, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                self._born(leaf.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def died(_: Any) -> None:
            self.held -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, died)
        self.held += size
        self.peak = max(self.peak, self.held)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
