"""Compare every Triton kernel with float64 on a GPU, and replay a captured step on other data; no times."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from patchsparse import (
    PatchGrid,
    patch_batch_norm_act,
    patch_batch_norm_unpack,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
)

from ..measure.timing import check_parity
from ..subjects.convolutions import GROUPS
from .graphs import capture

__all__ = ["check", "check_graphs"]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Arguments = tuple[Tensor, ...]


def step(run: Callable[..., Tensor], inputs: Arguments) -> list[Tensor]:
    """Return the output of ``run`` and the gradients at the inputs for a fixed direction."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    y = run(*leaves)
    direction = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, direction)]


def operations(grid: PatchGrid, g: torch.Generator) -> Iterator[tuple[str, Callable[..., Tensor], Arguments]]:
    """Yield a name, a function of (backend, tensors) and float32 tensors, for every kind of kernel."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=grid.device)

    n = grid.num_active
    for s in (shape for group in GROUPS.values() for shape in group):
        weight = normal(s.c_out, s.c_in // s.groups, s.k, s.k) / (s.k * (s.c_in // s.groups) ** 0.5)
        options = (s.stride, s.k // 2, 1, s.groups)
        yield (
            f"conv {s}",
            lambda backend, x, w, b, o=options: patch_conv2d(x, w, b, grid, *o, backend=backend),
            (normal(n, s.c_in, s.p, s.p), weight, normal(s.c_out)),
        )
    yield (
        "transposed conv",
        lambda backend, x, w: patch_conv_transpose2d(x, w, None, grid, 2, 1, backend=backend),
        (normal(n, 64, 4, 4), normal(64, 32, 4, 4) / 32),
    )
    yield (
        "max-pool",
        lambda backend, x: patch_max_pool2d(x, grid, 3, 2, 1, backend=backend),
        (normal(n, 64, 16, 16),),
    )
    yield (
        "batch norm + ReLU + residual",
        lambda backend, x, r, w, b: patch_batch_norm_act(
            x, w, b, None, None, True, activation="relu", residual=r, backend=backend
        ),
        (normal(n, 96, 8, 8), normal(n, 96, 8, 8), normal(96), normal(96)),
    )
    yield (
        "batch norm + unpack + token",
        lambda backend, x, w, b, t: patch_batch_norm_unpack(x, grid, w, b, None, None, t, backend=backend),
        (normal(n, 96, 8, 8), normal(96), normal(96), normal(96)),
    )


def check(device: str) -> None:
    """Raise AssertionError unless every kernel agrees with float64 in every dtype."""
    g = torch.Generator(device).manual_seed(0)
    grid = PatchGrid.random(8, (9, 9), 0.4, generator=g)
    for name, run, inputs in operations(grid, g):
        for dtype, tolerance in TOLERANCE.items():
            rounded = tuple(i.to(dtype) for i in inputs)
            exact = step(lambda *i, r=run: r("gather", *i), tuple(i.double() for i in rounded))
            actual = step(lambda *i, r=run: r("triton", *i), rounded)
            for number, (a, e) in enumerate(zip(actual, exact, strict=True)):
                what = f"gradient {number}" if number else "output"
                check_parity(f"{name} {dtype} {what}", a, e, tolerance)
        sys.stdout.write(f"correct  {name}\n")


def check_graphs(device: str) -> None:
    """Raise AssertionError unless captured forward and backward passes replay correctly on other data."""
    g = torch.Generator(device).manual_seed(1)
    grid = PatchGrid.random(8, (9, 9), 0.4, generator=g)
    x = torch.randn(grid.num_active, 64, 2, 2, device=device).bfloat16()
    w = torch.randn(64, 64, 3, 3, device=device).bfloat16()
    token = torch.randn(64, device=device)

    def convolved() -> list[Tensor]:
        return step(lambda x, w: patch_conv2d(x, w, None, grid, 1, 1, backend="triton"), (x, w))

    def densified() -> list[Tensor]:
        run = lambda x, t: patch_batch_norm_unpack(x, grid, None, None, None, None, t, backend="triton")  # noqa: E731
        return step(run, (x, token))

    for name, run in (("convolution", convolved), ("batch norm + unpack", densified)):
        graph, results = capture(run)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for replayed, eager in zip(results, run(), strict=True):
            check_parity(f"replayed {name}", replayed, eager, 1e-6)
        sys.stdout.write(f"correct  CUDA graph of {name}, forward and backward, replayed on other data\n")
