"""Autograd's own thread of a device, without a GPU: a process of its own, run by ``test_bind_threads.py``.

PyTorch takes a device that is written in Python, for which its engine starts a thread as for a CUDA device: nodes whose
gradients are there run in it. What is checkpointed here computes on the CPU and ends on that device, so that backward
recomputes it in that thread, where neither the thread's nor the context's state of the forward pass is to be found.
"""

from __future__ import annotations

import os
import sys
import threading
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils.checkpoint import checkpoint

from patchsparse import PatchGrid, bind, pack, sparsify

_torch: Any = torch._C
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRIDS = [PatchGrid.random(2, (2, 2), 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 3)]


class _Device(backend_registration._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


class _There(torch.autograd.Function):
    """To the device; only what lies on the CPU has values, and waits here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        _There.waiting = x.detach()
        return _torch._acc.create_empty_tensor(tuple(x.shape), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        assert ctx.saved_tensors[0].shape == _Back.gradient.shape  # a checkpoint recomputes here, if not before
        return _Back.gradient

    waiting: Tensor


class _Back(torch.autograd.Function):
    """From the device."""

    gradient: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = (tuple(x.shape), x.dtype)
        return _There.waiting.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Back.gradient = grads[0].clone()
        return _torch._acc.create_empty_tensor(*ctx.like)


class Blocks(nn.Module):
    """Four convolutions in two halves; all, halves and single ones may be checkpointed, each in its way."""

    def __init__(self, outer: bool | None, inner: bool | None):
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(4))
        self.layers = nn.ModuleList(layers)
        self.ways = (outer, inner)
        self.seen: list[bool] = []

    def _run(self, function: Any, x: Tensor, reentrant: bool | None) -> Tensor:
        if reentrant is None:
            return function(x)
        result: Any = checkpoint(function, x, use_reentrant=reentrant, preserve_rng_state=False)
        return result

    def _half(self, x: Tensor, first: int) -> Tensor:
        self.seen.append(threading.current_thread() is threading.main_thread())
        for layer in self.layers[first : first + 2]:
            x = self._run(layer, x, self.ways[1])
        return _There.apply(x)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        for first in (0, 2):
            y = self._run(lambda z, first=first: self._half(z, first), x, self.ways[0])
            x = _Back.apply(y)  # type: ignore[assignment]
        return x


def gradients(outer: bool | None, inner: bool | None, declared: bool | None, within: bool) -> list[Tensor]:
    """Return the gradients of two passes on two grids; backward comes after, or ``within`` a block on the last."""
    model = sparsify(Blocks(outer, inner).double())
    model.seen.clear()
    losses = []
    for grid in GRIDS[1:] if within else GRIDS:
        x = pack(IMAGES, grid).requires_grad_()
        with bind(model, grid, checkpointing=declared):
            losses.append(model(x).sin().sum())
            if within:
                losses[-1].backward()
    if not within:
        for loss in losses:
            loss.backward()
    assert outer is None or False in model.seen, "nothing was recomputed in another thread"
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    """Compare every nesting of checkpoints with none, then what is not known."""
    backend_registration._setup_privateuseone_for_python_backend("pretended", _Device())
    ways = (None, True, False)
    for within in (False, True):
        expected = gradients(None, None, None, within)
        for outer, inner in product(ways, ways):
            found = gradients(outer, inner, True, within)
            close = [torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True)]
            assert all(close), (outer, inner, within)
    for reentrant in (True, False):
        with pytest.raises(RuntimeError, match="checkpointing=True"):
            gradients(reentrant, None, None, False)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
        expected = gradients(None, None, None, True)
        found = gradients(True, None, None, True)  # the block that backward is called in says which grid
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    sys.stdout.write("recomputed in autograd's thread\n")
    sys.stdout.flush()
    os._exit(0)  # a device in Python does not survive that Python ends


if __name__ == "__main__":
    main()
