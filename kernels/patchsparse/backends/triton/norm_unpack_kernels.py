"""Kernels of batch normalisation fused with ``unpack``: packed rows to whole images; launches in ``norm_unpack.py``.

An image batch in channels_last memory is a matrix of ``B * H * W`` rows of C values, one per pixel. Every pixel finds
its packed row through the slot map, so an image is written once, in the order of its memory. As in ``norm_kernels.py``,
``u = (x - mean) * rstd``; ``y = u * weight + bias`` at active pixels and ``y = fill`` at the others; ``d = grad``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norm_kernels import channel_statistics

__all__ = ["unpack_norm_fwd_kernel", "unpack_norm_grad_apply_kernel", "unpack_norm_grad_sums_kernel"]


@triton.jit
def _row_at(pixel, m_pixel, p_slot, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the packed row that lies at each pixel of the images, -1 at inactive patches."""
    v, h = pixel // (columns * WIDTH), pixel % (columns * WIDTH)  # v counts through all images, as slot's rows do
    slot = tl.load(p_slot + v // HEIGHT * columns + h // WIDTH, mask=m_pixel, other=-1)
    return tl.where(slot < 0, -1, slot * (HEIGHT * WIDTH) + v % HEIGHT * WIDTH + h % WIDTH)


@triton.jit
def _pixel_of(row, m_row, p_coords, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the pixel of the images at which each packed row lies."""
    patch, inner = row // (HEIGHT * WIDTH), row % (HEIGHT * WIDTH)
    image = tl.load(p_coords + patch * 3, mask=m_row, other=0)
    grid_v = tl.load(p_coords + patch * 3 + 1, mask=m_row, other=0)
    grid_h = tl.load(p_coords + patch * 3 + 2, mask=m_row, other=0)
    v = (image * rows + grid_v) * HEIGHT + inner // WIDTH
    return v * (columns * WIDTH) + grid_h * WIDTH + inner % WIDTH


@triton.jit
def unpack_norm_fwd_kernel(
    p_x, p_fill, p_y, p_slot, p_mean, p_var, p_weight, p_bias, count, columns, channels, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute all pixels: ``(x - mean) * rstd * weight + bias`` where active, else ``fill`` (0 if None)."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < count, o_c < channels
    row = _row_at(o_m, m_m, p_slot, columns, HEIGHT, WIDTH)
    mean, rstd, weight, bias = channel_statistics(p_mean, p_var, p_weight, p_bias, o_c, m_c, eps)
    active = (row >= 0)[:, None]
    x = tl.load(p_x + row.to(tl.int64)[:, None] * channels + o_c, mask=active & m_c, other=0.0).to(tl.float32)
    fill = bias * 0.0
    if p_fill is not None:
        fill = tl.load(p_fill + o_c, mask=m_c, other=0.0).to(tl.float32)
    y = tl.where(active, (x - mean) * rstd * weight + bias, fill)
    at = o_m.to(tl.int64)[:, None] * channels + o_c
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c)


@triton.jit
def unpack_norm_grad_sums_kernel(
    p_g, p_x, p_slot, p_parts, p_mean, p_var, count, splits, columns, channels, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute over the split's pixels: ``sum of d`` and of ``d * u`` where active, ``sum of d`` where not."""
    split = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mean, rstd, _, _ = channel_statistics(p_mean, p_var, None, None, o_c, m_c, eps)
    sum_d = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_du = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_fill = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(split * BLOCK_M, count, splits * BLOCK_M):
        o_m = r + tl.arange(0, BLOCK_M)
        m_m = o_m < count
        row = _row_at(o_m, m_m, p_slot, columns, HEIGHT, WIDTH)
        active = (row >= 0)[:, None] & m_c
        x = tl.load(p_x + row.to(tl.int64)[:, None] * channels + o_c, mask=active, other=0.0).to(tl.float32)
        g = tl.load(p_g + o_m.to(tl.int64)[:, None] * channels + o_c, mask=m_m[:, None] & m_c, other=0.0).to(tl.float32)
        d = tl.where(active, g, 0.0)
        sum_d += d
        sum_du += tl.where(active, (x - mean) * rstd, 0.0) * d
        sum_fill += tl.where(active, 0.0, g)
    at = split * channels + o_c
    tl.store(p_parts + at, tl.sum(sum_d, 0), mask=m_c)
    tl.store(p_parts + splits * channels + at, tl.sum(sum_du, 0), mask=m_c)
    tl.store(p_parts + 2 * splits * channels + at, tl.sum(sum_fill, 0), mask=m_c)


@triton.jit
def unpack_norm_grad_apply_kernel(
    p_g, p_x, p_gx, p_coords, p_sum_d, p_sum_du, p_mean, p_var, p_weight, count, rows, columns, channels, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``gx = rstd * weight * (d - (sum d + u * sum d u) / M)`` of the packed rows; no sums if not ``BATCH``."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < count, o_c < channels
    pixel = _pixel_of(o_m, m_m, p_coords, rows, columns, HEIGHT, WIDTH)
    m_x = m_m[:, None] & m_c
    d = tl.load(p_g + pixel.to(tl.int64)[:, None] * channels + o_c, mask=m_x, other=0.0).to(tl.float32)
    mean, rstd, weight, _ = channel_statistics(p_mean, p_var, p_weight, None, o_c, m_c, eps)
    at = o_m.to(tl.int64)[:, None] * channels + o_c
    if BATCH:
        u = (tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32) - mean) * rstd
        sum_d, sum_du = tl.load(p_sum_d + o_c, mask=m_c, other=0.0), tl.load(p_sum_du + o_c, mask=m_c, other=0.0)
        d -= (sum_d + u * sum_du) / count
    tl.store(p_gx + at, (d * rstd * weight).to(p_gx.dtype.element_ty), mask=m_x)
