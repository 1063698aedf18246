"""Fused batch normalisation + activation on the Triton engine: launches of ``norm_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...eager import known
from ...layout import packed_empty, packed_like
from ...precision import wide
from .launch import Start, processors
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
    "GradStarts",
    "Statistics",
    "Tiles",
    "apply_start",
    "batch_norm_act",
    "batch_norm_act_grad",
    "batch_norm_moments",
    "contiguous",
    "grad_starts",
    "moments_starts",
    "move_running",
    "rows_and_channels",
    "running_start",
    "tiles",
    "total_start",
    "types_of",
    "used_statistics",
]

Statistics = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # mean, var, weight, bias: (C,)
Shape = tuple[int, ...]  # of a packed tensor (N, C, ph, pw)
Types = tuple[torch.dtype | None, ...]
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


@known
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


def types_of(*tensors: Tensor | None) -> Types:
    """Return the types of tensors; with shape and device all that a remembered :class:`Start` depends on."""
    return tuple([None if t is None else t.dtype for t in tensors])


def batch_norm_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``(C,)`` float32 of packed ``x`` over all its pixels."""
    return used_statistics(packed_like(x), None, None)


class MomentsStarts(NamedTuple):
    """The kernels that compute mean and variance: of ``splits`` shares of the rows, and all together."""

    splits: int
    some: Start
    combine: Start


@known
def moments_starts(shape: Shape, device: torch.device, dtype: torch.dtype) -> MomentsStarts:
    """Return the starts for packed tensors of ``shape``; tensors: x, parts; parts, mean, var."""
    count, channels = rows_and_channels(shape)
    programs, splits, block = tiles(count, channels, device)
    numbers, over = (count, splits, channels), OVER_SPLITS | {"ROWS": block["BLOCK_M"]}
    some = Start(norm_moments_kernel, (splits, programs[1]), numbers, block)
    combined = ceil(channels / OVER_SPLITS["BLOCK_C"])
    return MomentsStarts(splits, some, Start(norm_combine_kernel, (combined,), numbers, over))


def move_running(running: Running, mean: Tensor, var: Tensor, rows: int, momentum: float) -> None:
    """Move the running statistics towards ``mean`` and biased ``var`` ``(C,)`` of ``rows`` rows; count the batch."""
    types = types_of(mean, var, *running)
    running_start(mean.shape[0], mean.device, types, rows / (rows - 1), float(momentum))(mean, var, *running)
    torch.autograd.graph.increment_version([t for t in running if t is not None])


@known
def running_start(channels: int, device: torch.device, types: Types, unbiased: float, momentum: float) -> Start:
    """Return the start of :func:`move_running`; tensors: mean, var, running mean and variance, batches."""
    block = 512
    numbers = (channels, momentum, unbiased)
    return Start(norm_running_kernel, (ceil(channels / block),), numbers, {"BLOCK": block})


def used_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return views of the given mean and variance, or those of ``x`` ``(N, C, ph, pw)`` in channels_last memory."""
    if mean is not None and var is not None:
        return wide(mean).detach(), wide(var).detach()
    channels = x.shape[1]
    starts = moments_starts(x.shape, x.device, x.dtype)
    parts = x.new_empty((2, starts.splits, channels), dtype=torch.float32)
    mean, var = x.new_empty(channels, dtype=torch.float32), x.new_empty(channels, dtype=torch.float32)
    starts.some(x, parts)
    starts.combine(parts, mean, var)
    return mean, var


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
    x, residual = packed_like(x), None if residual is None else packed_like(residual)
    mean, var = used_statistics(x, mean, var)
    statistics = contiguous((mean, var, weight, bias))
    y = packed_empty(x, *x.shape)
    start = apply_start(x.shape, x.device, types_of(x, residual, *statistics), (eps, activation, slope))
    start(x, residual, y, *statistics)
    return y, mean, var


@known
def apply_start(shape: Shape, device: torch.device, types: Types, options: Options) -> Start:
    """Return the start of the forward pass; tensors: x, residual, y, mean, var, weight, bias."""
    eps, activation, slope = options
    count, channels = rows_and_channels(shape)
    programs, _, block = tiles(count, channels, device)
    numbers = (count, channels, float(eps), float(slope))
    return Start(norm_apply_kernel, programs, numbers, {"ACT": activation, **block})


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
    g, x, residual = packed_like(g), packed_like(x), None if residual is None else packed_like(residual)
    statistics, shape = contiguous((mean, var, weight, bias)), x.shape
    types = types_of(g, x, residual, *statistics)
    starts = grad_starts(shape, x.device, types, (eps, activation, slope), batch)
    gx, gr = packed_empty(x, *shape), None
    if residual is not None:
        finer = x if torch.finfo(x.dtype).eps <= torch.finfo(residual.dtype).eps else residual  # gx is made of gr
        gr = packed_empty(finer, *shape)
    parts = x.new_empty((2, starts.splits, shape[1]), dtype=torch.float32)
    gb, gw = x.new_empty(shape[1], dtype=torch.float32), x.new_empty(shape[1], dtype=torch.float32)
    starts.sums(g, x, residual, gr, parts, *statistics)
    starts.total(parts, gb, gw, gw)
    maps = (x, g if gr is None else None, gr, gx)
    if join is None:
        starts.apply(*maps, gb, gw, *statistics)
    else:  # nobody knows of which type they come back
        starts.apply.launch(*maps, *join(torch.stack((gb, gw))).unbind(), *statistics).run()
    return gx, None if gr is None or residual is None else gr.to(residual.dtype), gw, gb


class GradStarts(NamedTuple):
    """The kernels of a norm's backward pass: sums over ``splits`` shares of rows or of pixels, over all, and gx."""

    splits: int
    sums: Start
    total: Start
    apply: Start


@known
def grad_starts(shape: Shape, device: torch.device, types: Types, options: Options, batch: bool) -> GradStarts:
    """Return the starts of the backward pass.

    Tensors: g, x, residual, gr, parts, then mean, var, weight and bias; those of :func:`total_start`; x, g, gr, gx, sum
    of d, sum of d u, then mean, var, weight and bias. Where there is ``gr``, the last is not given g.
    """
    eps, activation, slope = options
    count, channels = rows_and_channels(shape)
    # Two sums a thread: whole tiles would leave registers for three programs on a processor.
    programs, splits, block = tiles(count, channels, device, 2)
    more = (channels, float(eps), float(slope))
    sums = Start(norm_grad_sums_kernel, (splits, programs[1]), (count, splits, *more), {"ACT": activation, **block})
    programs, _, block = tiles(count, channels, device)
    constants = {"ACT": activation, "BATCH": batch, **block}
    apply = Start(norm_grad_apply_kernel, programs, (count, *more), constants)
    return GradStarts(splits, sums, total_start(2, splits, channels, device), apply)


@known
def total_start(number: int, splits: int, channels: int, device: torch.device) -> Start:
    """Return the start that adds ``parts`` ``(number, splits, C)`` over the splits, into as many totals, at most three.

    Tensors: parts, then three totals, the last one again where there are two.
    """
    programs = (ceil(channels / OVER_SPLITS["BLOCK_C"]), number)
    return Start(norm_total_kernel, programs, (splits, channels), OVER_SPLITS)


def rows_and_channels(shape: Shape) -> tuple[int, int]:
    """Return the number of rows and of channels of packed tensors ``(N, C, ph, pw)``."""
    patches, channels, height, width = shape
    return patches * height * width, channels
