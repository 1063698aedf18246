"""Batch normalisation fused with ``unpack`` on the Triton engine: launches of ``norm_unpack_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Launch, as_rows, row_major, rows_like
from .norm import Statistics, contiguous, tiles, total_launch, used_statistics
from .norm_unpack_kernels import unpack_norm_fwd_kernel, unpack_norm_grad_apply_kernel, unpack_norm_grad_sums_kernel

__all__ = [
    "batch_norm_unpack",
    "batch_norm_unpack_grad",
    "unpack_norm_grad_launch",
    "unpack_norm_launch",
    "unpack_norm_sums_launches",
]

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
    packed = as_rows(x)
    mean, var = used_statistics(packed, mean, var)
    batch, rows, columns = slot.shape
    y = rows_like(x, batch, (rows * x.shape[2], columns * x.shape[3]), x.shape[1])
    fill = None if fill is None else fill.contiguous()
    unpack_norm_launch(packed, fill, y, row_major(slot, coords), contiguous((mean, var, weight, bias)), eps).run()
    return y, mean, var


def unpack_norm_launch(
    rows: Tensor, fill: Tensor | None, y: Tensor, maps: Maps, statistics: Statistics, eps: float
) -> Launch:
    """Return the launch that fills ``y`` ``(B, C, H, W)`` from ``rows`` ``(N, ph, pw, C)``."""
    _, height, width, channels = rows.shape
    count = y.shape[0] * y.shape[2] * y.shape[3]
    programs, _, block = tiles(count, channels, rows.device)
    return Launch(
        unpack_norm_fwd_kernel,
        programs,
        (rows, fill, y, maps[0], *statistics, count, maps[0].shape[2], channels, eps),
        {"HEIGHT": height, "WIDTH": width, **block},
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
    join: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, weight, bias and fill; see ``gather`` for ``batch`` and ``join``."""
    statistics = contiguous((mean, var, weight, None))
    gx = rows_like(x, x.shape[0], (x.shape[2], x.shape[3]), x.shape[1])
    gb, gw, gf = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(3))
    operands, maps = (as_rows(g), as_rows(x)), row_major(slot, coords)
    for launch in unpack_norm_sums_launches(*operands, (gb, gw, gf), maps, statistics, eps):
        launch.run()
    sums = (gb, gw) if join is None else tuple(join(torch.stack((gb, gw))).unbind())
    unpack_norm_grad_launch(*operands, sums, gx, maps, statistics, eps, batch).run()
    return gx, gw, gb, gf


def unpack_norm_sums_launches(
    g: Tensor, x: Tensor, sums: tuple[Tensor, Tensor, Tensor], maps: Maps, statistics: Statistics, eps: float
) -> list[Launch]:
    """Return the launches that fill ``sums`` = of d, of d u and of the fill's d, from g ``(B, H, W, C)``."""
    slot, _ = maps
    _, height, width, channels = x.shape
    pixels = g.numel() // channels
    # Three sums a thread: whole tiles would leave registers for one program less.
    programs, splits, block = tiles(pixels, channels, x.device, 2)
    parts = x.new_empty(3, splits, channels, dtype=torch.float32)
    arguments = (g, x, slot, parts, *statistics[:2], pixels, splits, slot.shape[2], channels, eps)
    constants = {"HEIGHT": height, "WIDTH": width, **block}
    some = Launch(unpack_norm_grad_sums_kernel, (splits, programs[1]), arguments, constants, 4, 1)
    return [some, total_launch(parts, sums)]


def unpack_norm_grad_launch(
    g: Tensor,
    x: Tensor,
    sums: tuple[Tensor, ...],
    gx: Tensor,
    maps: Maps,
    statistics: Statistics,
    eps: float,
    batch: bool,
) -> Launch:
    """Return the launch that fills ``gx`` from g ``(B, H, W, C)``, and from ``sums`` if ``batch``."""
    slot, coords = maps
    _, height, width, channels = x.shape
    count = x.numel() // channels
    programs, _, block = tiles(count, channels, x.device)
    mean, var, weight, _ = statistics
    return Launch(
        unpack_norm_grad_apply_kernel,
        programs,
        (g, x, gx, coords, *sums, mean, var, weight, count, slot.shape[1], slot.shape[2], channels, eps),
        {"HEIGHT": height, "WIDTH": width, "BATCH": batch, **block},
        4,
        1,
    )
