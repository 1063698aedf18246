"""Fused batch normalisation + activation on the Triton engine: launches of ``norm_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...eager import once
from ...precision import wide
from .launch import Launch, as_rows, processors, rows_like
from .norm_kernels import (
    norm_apply_kernel,
    norm_combine_kernel,
    norm_grad_apply_kernel,
    norm_grad_sums_kernel,
    norm_moments_kernel,
    norm_running_kernel,
    norm_total_kernel,
)

__all__ = [
    "Statistics",
    "Tiles",
    "apply_launch",
    "batch_norm_act",
    "batch_norm_act_grad",
    "batch_norm_moments",
    "contiguous",
    "grad_apply_launch",
    "moments_launches",
    "move_running",
    "running_launch",
    "sums_launches",
    "tiles",
    "total_launch",
    "used_statistics",
]

Statistics = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # mean, var, weight, bias: (C,)
Running = tuple[Tensor, Tensor, Tensor | None]  # mean, var: (C,) without gaps; batches: int64
Options = tuple[float, str, float]  # eps, activation, slope

MOST_SPLITS = 512  # one program holds the parts of all splits, for 8 channels: the sectors that memory is read by
OVER_SPLITS = {"BLOCK_S": MOST_SPLITS, "BLOCK_C": 8}


class Tiles(NamedTuple):
    """How programs share a map.

    Attributes:
        programs: one for each tile of rows; one for each tile of channels.
        splits: programs that share the rows of one tile of channels where each has several.
        block: rows and channels of a tile, as the kernels call them.
    """

    programs: tuple[int, int]
    splits: int
    block: dict[str, int]


@once
def tiles(rows: int, channels: int, device: torch.device, halves: int = 1) -> Tiles:
    """Return tiles of 4096 values and at most 64 channels, divided by ``halves``; half if loads are of single values.

    Four programs a processor share the rows, if there are as many tiles.
    """
    c = min(64, max(16, 1 << (channels - 1).bit_length()))
    m = (4096 if channels % 8 == 0 else 2048) // c // halves
    programs = ceil(rows / m), ceil(channels / c)
    splits = min(programs[0], ceil(4 * processors(device) / programs[1]), MOST_SPLITS)
    return Tiles(programs, splits, {"BLOCK_M": m, "BLOCK_C": c})


def contiguous(statistics: Statistics) -> Statistics:
    """Return the same values, each without gaps in memory."""
    mean, var, weight, bias = statistics
    weight, bias = weight if weight is None else weight.contiguous(), bias if bias is None else bias.contiguous()
    return mean.contiguous(), var.contiguous(), weight, bias


def batch_norm_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``(C,)`` float32 of packed ``x`` over all its pixels."""
    return used_statistics(as_rows(x), None, None)


def moments_launches(rows: Tensor, mean: Tensor, var: Tensor) -> list[Launch]:
    """Return the launches that fill ``mean`` and ``var`` from ``rows`` ``(N, ph, pw, C)``."""
    channels = rows.shape[-1]
    count = rows.numel() // channels
    programs, splits, block = tiles(count, channels, rows.device)
    parts = rows.new_empty(2, splits, channels, dtype=torch.float32)
    some = Launch(norm_moments_kernel, (splits, programs[1]), (rows, parts, count, splits, channels), block, 4, 1)
    arguments, over = (parts, mean, var, count, splits, channels), OVER_SPLITS | {"ROWS": block["BLOCK_M"]}
    return [some, Launch(norm_combine_kernel, (ceil(channels / OVER_SPLITS["BLOCK_C"]),), arguments, over, 4, 1)]


def move_running(running: Running, mean: Tensor, var: Tensor, rows: int, momentum: float) -> None:
    """Move the running statistics towards ``mean`` and biased ``var`` ``(C,)`` of ``rows`` rows; count the batch."""
    running_launch(running, mean, var, rows, momentum).run()
    torch.autograd.graph.increment_version([t for t in running if t is not None])


def running_launch(running: Running, mean: Tensor, var: Tensor, rows: int, momentum: float) -> Launch:
    """Return the launch of :func:`move_running`."""
    channels, block = mean.shape[0], 512
    arguments = (mean, var, *running, channels, float(momentum), rows / (rows - 1))
    return Launch(norm_running_kernel, (ceil(channels / block),), arguments, {"BLOCK": block}, 4, 1)


def used_statistics(rows: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return views of the given mean and variance, or those of ``rows`` ``(N, ph, pw, C)``."""
    if mean is not None and var is not None:
        return wide(mean).detach(), wide(var).detach()
    mean, var = _vectors(rows, 2)
    for launch in moments_launches(rows, mean, var):
        launch.run()
    return mean, var


def _vectors(x: Tensor, number: int) -> tuple[Tensor, ...]:
    """Return uninitialised vectors of the channels of ``x`` ``(N, ph, pw, C)``, float32."""
    return tuple(x.new_empty(x.shape[3], dtype=torch.float32) for _ in range(number))


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``act((x - mean) * rstd * weight + bias + residual)`` and the mean and biased variance used."""
    rows = as_rows(x)
    mean, var = used_statistics(rows, mean, var)
    y = rows_like(x, x.shape[0], (x.shape[2], x.shape[3]), x.shape[1])
    other = None if residual is None else as_rows(residual)
    apply_launch(rows, other, y, contiguous((mean, var, weight, bias)), (eps, activation, slope)).run()
    return y, mean, var


def apply_launch(rows: Tensor, residual: Tensor | None, y: Tensor, statistics: Statistics, options: Options) -> Launch:
    """Return the launch that fills ``y`` ``(N, C, ph, pw)`` from ``rows`` and ``residual`` ``(N, ph, pw, C)``."""
    eps, activation, slope = options
    channels = rows.shape[-1]
    count = rows.numel() // channels
    programs, _, block = tiles(count, channels, rows.device)
    arguments = (rows, residual, y, *statistics, count, channels, eps, slope)
    return Launch(norm_apply_kernel, programs, arguments, {"ACT": activation, **block}, 4, 1)


def batch_norm_act_grad(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    slope: float,
    batch: bool,
    join: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients at x, residual, weight and bias; see ``gather`` for ``batch`` and ``join``."""
    statistics, options = contiguous((mean, var, weight, bias)), (eps, activation, slope)
    size = (x.shape[2], x.shape[3])
    gx, gr = rows_like(x, x.shape[0], size, x.shape[1]), None
    if residual is not None:
        finer = x if torch.finfo(x.dtype).eps <= torch.finfo(residual.dtype).eps else residual  # gx is made of gr
        gr = rows_like(finer, x.shape[0], size, x.shape[1])
    inputs = (as_rows(g), as_rows(x))
    gb, gw = _vectors(inputs[1], 2)
    other = None if residual is None else as_rows(residual)
    for launch in sums_launches(*inputs, other, (gr, gb, gw), statistics, options):
        launch.run()
    sums = (gb, gw) if join is None else tuple(join(torch.stack((gb, gw))).unbind())
    grad_apply_launch(*inputs, gr, sums, gx, statistics, options, batch).run()
    return gx, None if gr is None or residual is None else gr.to(residual.dtype), gw, gb


def sums_launches(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    outputs: tuple[Tensor | None, Tensor, Tensor],
    statistics: Statistics,
    options: Options,
) -> list[Launch]:
    """Return the launches that fill ``outputs`` = (gr, sum d, sum d u) from tensors ``(N, ph, pw, C)``."""
    eps, activation, slope = options
    gr, *sums = outputs
    channels = x.shape[-1]
    count = x.numel() // channels
    # Two sums a thread: whole tiles would leave registers for three programs on a processor.
    programs, splits, block = tiles(count, channels, x.device, 2)
    parts = x.new_empty(2, splits, channels, dtype=torch.float32)
    arguments = (g, x, residual, gr, parts, *statistics, count, splits, channels, eps, slope)
    some = Launch(norm_grad_sums_kernel, (splits, programs[1]), arguments, {"ACT": activation, **block}, 4, 1)
    return [some, total_launch(parts, tuple(sums))]


def total_launch(parts: Tensor, totals: tuple[Tensor, ...]) -> Launch:
    """Return the launch that adds ``parts`` ``(n, splits, C)`` over the splits, into n ``totals``, at most three."""
    number, splits, channels = parts.shape
    three = (*totals, totals[-1])[:3]
    programs = (ceil(channels / OVER_SPLITS["BLOCK_C"]), number)
    return Launch(norm_total_kernel, programs, (parts, *three, splits, channels), OVER_SPLITS, 4, 1)


def grad_apply_launch(
    g: Tensor,
    x: Tensor,
    gr: Tensor | None,
    sums: tuple[Tensor, ...],
    gx: Tensor,
    statistics: Statistics,
    options: Options,
    batch: bool,
) -> Launch:
    """Return the launch that fills ``gx`` ``(N, C, ph, pw)`` from ``gr`` or ``g``, and from ``sums`` if ``batch``."""
    eps, activation, slope = options
    channels = x.shape[-1]
    count = x.numel() // channels
    programs, _, block = tiles(count, channels, x.device)
    return Launch(
        norm_grad_apply_kernel,
        programs,
        (x, g if gr is None else None, gr, gx, *sums, *statistics, count, channels, eps, slope),
        {"ACT": activation, "BATCH": batch, **block},
        4,
        1,
    )
