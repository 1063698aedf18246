"""Time what the host does in eager calls of the Triton engine, on a fake GPU: ``python -m benchmarks.gpu.host``.

Kernels are compiled and never launched (``fake.py``), so what is left is the time in which Python, PyTorch and Triton
prepare a launch: the least that an eager step can take, whatever the GPU. It is time of the processor, not of the clock
on the wall: the median of repetitions. ``--against CHECKOUT`` times the kernels of another checkout in turn with these,
in the same process. Calls of Python functions are counted beside, which no other process disturbs.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from .fake import fake_gpu

__all__ = ["calls", "load", "main", "python_calls"]

HERE = str(Path(__file__).parent)
ROUNDS, REPEATED = 40, 10


def load(checkout: Path) -> ModuleType:
    """Return the package ``patchsparse`` of another checkout; it and its operators have another name."""
    folder, name = checkout / "kernels" / "patchsparse", "patchsparse_before"
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; give the root of a checkout")
    sys.modules[name] = module = module_from_spec(spec)
    register = torch.library.custom_op

    def renamed(operator: str, *args: Any, **kwargs: Any) -> Any:
        return register(f"{name}::{operator.rpartition('::')[2]}", *args, **kwargs)

    with mock.patch.object(torch.library, "custom_op", renamed):
        spec.loader.exec_module(module)
    return module


class _Step:
    """The operators of a ResNet's step on few patches, with gradients that no call leaves behind."""

    def __init__(self, package: ModuleType, channels: int, p: int):
        self.package, self.norm = package, import_module(f"{package.__name__}.functional.norm")
        self.grid = package.PatchGrid.random(4, (8, 8), keep=0.4, generator=torch.Generator().manual_seed(0))
        patches = self.grid.num_active
        self.x, self.g = _random(patches, channels, p, p).requires_grad_(), _random(patches, channels, p, p)
        self.wide, self.narrow = _random(patches, 64, 8, 8).requires_grad_(), _random(patches, 64, 4, 4)
        self.images = _random(4, channels, 8 * p, 8 * p)
        self.weight = nn.Parameter(_random(channels, channels, 3, 3))
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running = (torch.zeros(channels), torch.ones(channels))

    def _backward(self, y: Tensor, g: Tensor) -> None:
        y.backward(g)
        for leaf in (self.x, self.wide, self.weight, self.scale, self.shift):
            leaf.grad = None

    def conv(self) -> None:
        """Run a 3x3 convolution forward and backward."""
        self._backward(self.package.patch_conv2d(self.x, self.weight, None, self.grid, padding=1), self.g)

    def conv_forward(self) -> None:
        """Run a 3x3 convolution forward, without a graph."""
        with torch.no_grad():
            self.package.patch_conv2d(self.x, self.weight, None, self.grid, padding=1)

    def max_pool(self) -> None:
        """Run a max-pool forward and backward."""
        self._backward(self.package.patch_max_pool2d(self.wide, self.grid, 3, 2, 1), self.narrow)

    def norm_act(self) -> None:
        """Run batch norm, addition and ReLU forward and backward."""
        arguments = (self.x, self.scale, self.shift, *self.running, True)
        self._backward(self.norm.patch_batch_norm_act(*arguments, activation="relu", residual=self.x), self.g)

    def norm_unpack(self) -> None:
        """Run batch norm and the laying out of images forward and backward."""
        arguments = (self.x, self.grid, self.scale, self.shift, *self.running)
        self._backward(self.norm.patch_batch_norm_unpack(*arguments, training=True), self.images)

    def pack(self) -> None:
        """Cut images into patches and lay them back."""
        self.package.unpack(self.package.pack(self.images, self.grid), self.grid)


def _encoder(package: ModuleType, fuse: bool | None) -> Callable[[], None]:
    """Return two passes of a sparsified narrow ResNet-18 under autocast, with float32 weights, a grid bound anew."""
    model = timm.create_model("resnet18", in_chans=12, features_only=True, channels=(16, 32, 32, 32))
    model = package.sparsify(model.to(memory_format=torch.channels_last).train(), fuse=fuse)
    grid = package.PatchGrid.random(2, (2, 2), keep=2, generator=torch.Generator().manual_seed(0))
    packed = _random(grid.num_active, 12, 32, 32)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16), package.bind(model, grid):
            features = model(packed)
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
        model.zero_grad()

    return run


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def calls(package: ModuleType, channels: int = 256, p: int = 2) -> dict[str, Callable[[], None]]:
    """Return calls of the operators of a ResNet's step by name.

    Args:
        package: ``patchsparse``.
        channels: of the 3x3 layer and of the norms.
        p: side of a patch there, in pixels.
    """
    step = _Step(package, channels, p)
    return {
        "3x3 convolution, three passes": step.conv,
        "3x3 convolution, forward without a graph": step.conv_forward,
        "max-pool, two passes": step.max_pool,
        "norm + residual + ReLU, two passes": step.norm_act,
        "norm + unpack, two passes": step.norm_unpack,
        "pack, then unpack": step.pack,
        "narrow ResNet-18 under autocast, two passes": _encoder(package, None),
        "the same, its norms PyTorch's": _encoder(package, False),
    }


def python_calls(run: Callable[[], None]) -> int:
    """Return how many Python functions a warm call calls, in this thread; those of the fake GPU do not count."""
    count = 0

    def called(frame, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and not frame.f_code.co_filename.startswith(HERE)

    for _ in range(3):
        run()
    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def _microseconds(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Return the median time of the processor for one call of each, taken in turn."""
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, times in zip(runs, spent, strict=True):
            begun = time.process_time()
            for _ in range(REPEATED):
                run()
            times.append((time.process_time() - begun) / REPEATED * 1e6)
    return [statistics.median(times) for times in spent]


def _keep_memory() -> None:
    """Let the C library keep what is freed, as PyTorch's allocator of a GPU does, instead of asking the system anew."""
    limit = 2**31 - 1
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(parameter, limit)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.host", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="root of another checkout, timed in turn")
    against = parser.parse_args(argv).against
    _keep_memory()
    torch.set_num_threads(1)
    packages = [import_module("patchsparse")] if against is None else [load(against), import_module("patchsparse")]
    sys.stdout.write("| what (fake GPU) | microseconds of the host | calls of Python functions |\n|---|---|---|\n")
    with fake_gpu("h100"):
        ways = [calls(package) for package in packages]
        for name in ways[0]:
            runs = [way[name] for way in ways]
            counts, found = [python_calls(run) for run in runs], _microseconds(runs)
            share = f" ({found[-1] / found[0]:.2f} of it)" if len(found) == 2 else ""
            times, counted = (" -> ".join(f"{value:.0f}" for value in values) for values in (found, counts))
            sys.stdout.write(f"| {name} | {times}{share} | {counted} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
