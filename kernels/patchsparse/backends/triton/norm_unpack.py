"""Batch normalisation fused with ``unpack`` on the Triton engine: launches of ``norm_unpack_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...eager import known
from ...layout import packed_empty, packed_like
from .launch import Start, row_major
from .norm import (
    GradStarts,
    Shape,
    Types,
    contiguous,
    rows_and_channels,
    tiles,
    total_start,
    types_of,
    used_statistics,
)
from .norm_unpack_kernels import unpack_norm_fwd_kernel, unpack_norm_grad_apply_kernel, unpack_norm_grad_sums_kernel

__all__ = ["batch_norm_unpack", "batch_norm_unpack_grad", "unpack_grad_starts", "unpack_start"]


def batch_norm_unpack(
    x: Tensor,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images ``(B, C, H, W)`` of the normalised ``x``, and the mean and biased variance used.

    Inactive patches hold ``fill`` ``(C,)`` or 0.
    """
    x = packed_like(x)
    mean, var = used_statistics(x, mean, var)
    batch, rows, columns = slot.shape
    y = packed_empty(x, batch, x.shape[1], rows * x.shape[2], columns * x.shape[3])
    fill = None if fill is None else fill.contiguous()
    statistics, (slot, _) = contiguous((mean, var, weight, bias)), row_major(slot, coords)
    start = unpack_start(x.shape, slot.shape, x.device, types_of(x, fill, *statistics), eps)
    start(x, fill, y, slot, *statistics)
    return y, mean, var


@known
def unpack_start(shape: Shape, grid: Shape, device: torch.device, types: Types, eps: float) -> Start:
    """Return the start of the forward pass; tensors: x, fill, y, slot, mean, var, weight, bias."""
    _, channels, height, width = shape
    batch, rows, columns = grid
    count = batch * rows * height * columns * width
    programs, _, block = tiles(count, channels, device)
    constants = {"HEIGHT": height, "WIDTH": width, **block}
    return Start(unpack_norm_fwd_kernel, programs, (count, columns, channels, float(eps)), constants)


def batch_norm_unpack_grad(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    slot: Tensor,
    coords: Tensor,
    eps: float,
    batch: bool,
    join: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, weight, bias and fill; see ``gather`` for ``batch`` and ``join``."""
    g, x, (slot, coords) = packed_like(g), packed_like(x), row_major(slot, coords)
    mean, var, weight, _ = contiguous((mean, var, weight, None))
    channels = x.shape[1]
    starts = unpack_grad_starts(x.shape, slot.shape, x.device, types_of(g, x, mean, var, weight), eps, batch)
    gx = packed_empty(x, *x.shape)
    parts = x.new_empty((3, starts.splits, channels), dtype=torch.float32)
    gb, gw, gf = (x.new_empty(channels, dtype=torch.float32) for _ in range(3))
    starts.sums(g, x, slot, parts, mean, var)
    starts.total(parts, gb, gw, gf)
    if join is None:
        starts.apply(g, x, gx, coords, gb, gw, mean, var, weight)
    else:  # nobody knows of which type they come back
        sums = join(torch.stack((gb, gw))).unbind()
        starts.apply.launch(g, x, gx, coords, *sums, mean, var, weight).run()
    return gx, gw, gb, gf


@known
def unpack_grad_starts(
    shape: Shape, grid: Shape, device: torch.device, types: Types, eps: float, batch: bool
) -> GradStarts:
    """Return the starts of the backward pass.

    Tensors: g, x, slot, parts, mean, var; those of `total_start`; g, x, gx, coords, sum of d, sum of d u, mean, var,
    weight.
    """
    _, channels, height, width = shape
    images, rows, columns = grid
    pixels = images * rows * height * columns * width
    # Three sums a thread: whole tiles would leave registers for one program less.
    programs, splits, block = tiles(pixels, channels, device, 2)
    patch = {"HEIGHT": height, "WIDTH": width}
    numbers = (pixels, splits, columns, channels, float(eps))
    sums = Start(unpack_norm_grad_sums_kernel, (splits, programs[1]), numbers, patch | block)
    count, _ = rows_and_channels(shape)
    programs, _, block = tiles(count, channels, device)
    numbers = (count, rows, columns, channels, float(eps))
    apply = Start(unpack_norm_grad_apply_kernel, programs, numbers, patch | {"BATCH": batch} | block)
    return GradStarts(splits, sums, total_start(3, splits, channels, device), apply)
