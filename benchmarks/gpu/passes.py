"""Count what the norms of an encoder start and move in a step, without a GPU: ``python -m benchmarks.gpu.passes``.

A step runs on the fake card at real sizes (``fake.py``). For our kernels, the bytes of a launch are those of its
arguments: each reads or writes every map that it is given once. For PyTorch's operators they are *modelled*: how often
its CUDA kernels read or write the map, from their source (``aten/src/ATen/native/cuda/Normalization.cuh``). Only maps
count; vectors of one value per channel are in launches and operators, not in bytes.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from patchsparse import PatchGrid, bind, sparsify
from patchsparse.backends.triton.launch import Start

from .fake import fake_gpu

__all__ = ["PASSES", "Traffic", "main", "traffic"]

# Reads and writes of a whole map by PyTorch's operators that norms, shortcuts and ReLUs consist of.
PASSES = {
    "native_batch_norm": 3,  # x for the statistics; x, y
    "native_batch_norm_backward": 5,  # g, x for the sums; g, x, gx
    "add_": 3,
    "relu_": 2,
    "threshold_backward": 3,
}
BATCH, SIZE, GRID, KEEP = 128, 288, (9, 9), 0.4


@dataclass
class Traffic:
    """What norms, shortcuts and activations of a step start and move.

    Attributes:
        operators: of PyTorch on whole maps, by name.
        launches: of our norm kernels, by name.
        moved: bytes of maps that are read or written.
    """

    operators: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    moved: int = 0


class _Watching(TorchDispatchMode):
    def __init__(self, seen: Traffic):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PASSES and args[0].dim() == 4:
            self.seen.operators[name] += 1
            self.seen.moved += PASSES[name] * _size(args[0])
        return func(*args, **(kwargs or {}))


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def traffic(model: nn.Module, x: Tensor, grid: PatchGrid) -> Traffic:
    """Return what a training step of a sparsified ``model`` on packed ``x`` does for its norms, on the fake card."""
    seen, run = Traffic(), Start.__call__

    def watched(start: Start, *tensors: Tensor | None) -> None:
        if start.kernel.fn.__name__.startswith("norm_"):
            seen.launches[start.kernel.fn.__name__] += 1
            seen.moved += sum(_size(t) for t in tensors if t is not None and t.dim() == 4)
        run(start, *tensors)

    with mock.patch.object(Start, "__call__", watched), _Watching(seen), bind(model, grid):
        torch.stack([f.sum() for f in model(x)]).sum().backward()
    return seen


def main() -> int:
    """Print a line for each encoder and way."""
    sys.stdout.write(f"batch {BATCH}, {SIZE}x{SIZE}, {1 - KEEP:.0%} masked, bfloat16\n")
    with fake_gpu(hollow=True, compiles=False):
        generator = torch.Generator().manual_seed(0)
        grid = PatchGrid.random(BATCH, GRID, keep=KEEP, generator=generator).to("cuda")
        patch = SIZE // GRID[0]
        for name in ("resnet18", "resnet50"):
            plain = timm.create_model(name, in_chans=12, features_only=True, out_indices=(1, 2, 3, 4)).train()
            x = torch.empty(grid.num_active, patch, patch, 12, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
            for way, fuse in (("one by one", False), ("in one", None)):
                model = sparsify(copy.deepcopy(plain), fuse=fuse).to("cuda", torch.bfloat16)
                seen = traffic(model, x, grid)
                sys.stdout.write(
                    f"{name}, {way}: {seen.operators.total()} operators of PyTorch, {seen.launches.total()} launches "
                    f"of ours, {seen.moved / 1e9:.2f} GB\n"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
