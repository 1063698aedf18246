"""Fused batch normalisation + activation on the Triton engine: launches of ``norm_kernels.py``."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from ...precision import wide
from .launch import Launch, as_rows, processors, rows_like
from .norm_kernels import (
    norm_apply_kernel,
    norm_combine_kernel,
    norm_grad_apply_kernel,
    norm_grad_sums_kernel,
    norm_moments_kernel,
    norm_total_kernel,
)

__all__ = [
    "Statistics",
    "apply_launch",
    "batch_norm_act",
    "batch_norm_act_grad",
    "blocks",
    "contiguous",
    "grad_launches",
    "moments",
    "moments_launches",
    "share_of",
    "used_statistics",
]

Statistics = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # mean, rstd, weight, bias: (C,)


def blocks(channels: int) -> tuple[int, int]:
    """Return rows and channels of a tile: 4096 values, at most 64 channels; half if loads are of single values."""
    c = min(64, max(16, 1 << (channels - 1).bit_length()))
    return (4096 if channels % 8 == 0 else 2048) // c, c


def share_of(x: Tensor, count: int, m: int, c: int) -> tuple[int, int]:
    """Return the number of splits of the rows, and the rows of each: whole tiles, four programs per processor."""
    wanted = ceil(4 * processors(x.device) / ceil(x.shape[-1] / c))
    share = ceil(ceil(count / wanted) / m) * m
    return ceil(count / share), share


def contiguous(statistics: Statistics) -> Statistics:
    """Return the same values, each without gaps in memory."""
    mean, rstd, weight, bias = (None if s is None else s.contiguous() for s in statistics)
    return mean, rstd, weight, bias  # pyright: ignore[reportReturnType]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``(C,)`` float32 of packed ``x`` over all its pixels."""
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    for launch in moments_launches(as_rows(x), mean, var):
        launch.run()
    return mean, var


def moments_launches(rows: Tensor, mean: Tensor, var: Tensor) -> list[Launch]:
    """Return the launches that fill ``mean`` and ``var`` from ``rows`` ``(N, ph, pw, C)``."""
    channels = rows.shape[-1]
    count = rows.numel() // channels
    m, c = blocks(channels)
    splits, share = share_of(rows, count, m, c)
    parts = rows.new_empty(2, splits, channels, dtype=torch.float32).unbind()
    tiles_c = ceil(channels / c)
    block = {"BLOCK_M": m, "BLOCK_C": c}
    some = Launch(norm_moments_kernel, (splits, tiles_c), (rows, *parts, count, share, channels), block, 4, 1)
    arguments = (*parts, mean, var, count, share, splits, channels)
    return [some, Launch(norm_combine_kernel, (tiles_c,), arguments, {"BLOCK_S": 64, "BLOCK_C": c}, 4, 1)]


def used_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return new tensors: the given mean and variance, or those of ``x``."""
    if mean is not None and var is not None:
        return wide(mean).clone(), wide(var).clone()
    return moments(x)


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
    mean, var = used_statistics(x, mean, var)
    statistics = contiguous((mean, (var + eps).rsqrt(), weight, bias))
    y = rows_like(x, x.shape[0], (x.shape[2], x.shape[3]), x.shape[1])
    other = None if residual is None else as_rows(residual)
    apply_launch(as_rows(x), other, y, statistics, activation, slope).run()
    return y, mean, var


def apply_launch(
    rows: Tensor, residual: Tensor | None, y: Tensor, statistics: Statistics, activation: str, slope: float
) -> Launch:
    """Return the launch that fills ``y`` ``(N, C, ph, pw)`` from ``rows`` and ``residual`` ``(N, ph, pw, C)``."""
    channels = rows.shape[-1]
    count = rows.numel() // channels
    m, c = blocks(channels)
    return Launch(
        norm_apply_kernel,
        (ceil(count / m), ceil(channels / c)),
        (rows, residual, y, *statistics, count, channels, slope),
        {"ACT": activation, "BLOCK_M": m, "BLOCK_C": c},
        4,
        1,
    )


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients at x, residual, weight and bias; with ``batch`` the statistics are those of x."""
    statistics = contiguous((mean, (var + eps).rsqrt(), weight, bias))
    size = (x.shape[2], x.shape[3])
    gx = rows_like(x, x.shape[0], size, x.shape[1])
    gr = None if residual is None else rows_like(residual, x.shape[0], size, x.shape[1])
    total = x.new_empty(2, x.shape[1], dtype=torch.float32)
    operands = (as_rows(g), as_rows(x), None if residual is None else as_rows(residual), (gx, gr, total))
    for launch in grad_launches(*operands, statistics, activation, slope, batch):
        launch.run()
    return gx, gr, total[1].clone(), total[0].clone()  # an operator's outputs may not share memory


def grad_launches(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    outputs: tuple[Tensor, Tensor | None, Tensor],
    statistics: Statistics,
    activation: str,
    slope: float,
    batch: bool,
) -> list[Launch]:
    """Return the launches that fill ``outputs`` = (gx, gr, (sum d, sum d u)) from tensors ``(N, ph, pw, C)``."""
    channels = x.shape[-1]
    count = x.numel() // channels
    m, c = blocks(channels)
    splits, share = share_of(x, count, m, c)
    sums = x.new_empty(2, splits, channels, dtype=torch.float32)
    tiles_c = ceil(channels / c)
    block = {"ACT": activation, "BLOCK_M": m, "BLOCK_C": c}
    scalars = (count, share, splits, channels, slope)
    inputs = (g, x, residual)
    return [
        Launch(norm_grad_sums_kernel, (splits, tiles_c), (*inputs, sums, *statistics, *scalars), block, 4, 1),
        Launch(
            norm_total_kernel,
            (tiles_c, 2),
            (sums, outputs[2], splits, channels),
            {"BLOCK_S": 64, "BLOCK_C": c},
            4,
            1,
        ),
        Launch(
            norm_grad_apply_kernel,
            (ceil(count / m), tiles_c),
            (*inputs, *outputs, *statistics, count, channels, slope),
            block | {"BATCH": batch},
            4,
            1,
        ),
    ]
