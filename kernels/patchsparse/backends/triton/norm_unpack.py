"""Batch normalisation fused with ``unpack`` on the Triton engine: launches of ``norm_unpack_kernels.py``."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from .launch import Launch, as_rows, row_major, rows_like
from .norm import Statistics, blocks, contiguous, share_of, used_statistics
from .norm_kernels import norm_total_kernel
from .norm_unpack_kernels import unpack_norm_fwd_kernel, unpack_norm_grad_apply_kernel, unpack_norm_grad_sums_kernel

__all__ = ["batch_norm_unpack", "batch_norm_unpack_grad", "unpack_norm_grad_launches", "unpack_norm_launch"]

Maps = tuple[Tensor, Tensor]  # slot, coords


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
    mean, var = used_statistics(x, mean, var)
    statistics = contiguous((mean, (var + eps).rsqrt(), weight, bias))
    batch, rows, columns = slot.shape
    y = rows_like(x, batch, (rows * x.shape[2], columns * x.shape[3]), x.shape[1])
    fill = None if fill is None else fill.contiguous()
    unpack_norm_launch(as_rows(x), fill, y, row_major(slot, coords), statistics).run()
    return y, mean, var


def unpack_norm_launch(rows: Tensor, fill: Tensor | None, y: Tensor, maps: Maps, statistics: Statistics) -> Launch:
    """Return the launch that fills ``y`` ``(B, C, H, W)`` from ``rows`` ``(N, ph, pw, C)``."""
    _, height, width, channels = rows.shape
    count = y.shape[0] * y.shape[2] * y.shape[3]
    m, c = blocks(channels)
    return Launch(
        unpack_norm_fwd_kernel,
        (ceil(count / m), ceil(channels / c)),
        (rows, fill, y, maps[0], *statistics, count, maps[0].shape[2], channels),
        {"HEIGHT": height, "WIDTH": width, "BLOCK_M": m, "BLOCK_C": c},
        4,
        1,
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, weight, bias and fill; with ``batch`` the statistics are those of x."""
    statistics = contiguous((mean, (var + eps).rsqrt(), weight, None))
    gx = rows_like(x, x.shape[0], (x.shape[2], x.shape[3]), x.shape[1])
    total = x.new_empty(3, x.shape[1], dtype=torch.float32)
    operands = (as_rows(g), as_rows(x), gx, total)
    for launch in unpack_norm_grad_launches(*operands, row_major(slot, coords), statistics, batch):
        launch.run()
    return gx, total[1].clone(), total[0].clone(), total[2].clone()  # an operator's outputs may not share memory


def unpack_norm_grad_launches(
    g: Tensor, x: Tensor, gx: Tensor, total: Tensor, maps: Maps, statistics: Statistics, batch: bool
) -> list[Launch]:
    """Return the launches that fill ``gx`` and ``total`` = sums of d, d u and the fill's d, from g ``(B, H, W, C)``."""
    slot, coords = maps
    _, height, width, channels = x.shape
    pixels, count = (t.numel() // channels for t in (g, x))
    m, c = blocks(channels)
    half = m // 2  # three sums a thread: whole tiles would leave registers for one program less
    splits, share = share_of(x, pixels, half, c)
    sums = x.new_empty(3, splits, channels, dtype=torch.float32)
    tiles_c = ceil(channels / c)
    block = {"HEIGHT": height, "WIDTH": width, "BLOCK_C": c}
    mean, rstd, weight, _ = statistics
    scalars = (pixels, share, splits, slot.shape[2], channels)
    inputs = (g, x, slot, sums, mean, rstd)
    return [
        Launch(unpack_norm_grad_sums_kernel, (splits, tiles_c), (*inputs, *scalars), block | {"BLOCK_M": half}, 4, 1),
        Launch(norm_total_kernel, (tiles_c, 3), (sums, total, splits, channels), {"BLOCK_S": 64, "BLOCK_C": c}, 4, 1),
        Launch(
            unpack_norm_grad_apply_kernel,
            (ceil(count / m), tiles_c),
            (g, x, gx, coords, total, mean, rstd, weight, count, slot.shape[1], slot.shape[2], channels),
            block | {"BLOCK_M": m, "BATCH": batch},
            4,
            1,
        ),
    ]
