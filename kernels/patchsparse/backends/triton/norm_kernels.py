"""Kernels of fused batch normalisation + activation over the packed rows; launch code is in ``norm.py``.

With packed tensors the statistics of the active pixels are simply those of all rows of the ``(M, C)`` matrix. Notation:
``u = (x - mean) * rstd``, ``z = u * weight + bias (+ residual)``, ``y = act(z)``, ``d = grad * act'(z)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "channel_statistics",
    "norm_apply_kernel",
    "norm_combine_kernel",
    "norm_grad_apply_kernel",
    "norm_grad_sums_kernel",
    "norm_moments_kernel",
    "norm_running_kernel",
    "norm_total_kernel",
]


@triton.jit
def _activate(z, slope, ACT: tl.constexpr):
    """Return act(z)."""
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)  # not maximum: NaN must stay
    elif ACT == "leaky_relu":
        return tl.where(z < 0, z * slope, z)
    elif ACT == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        return z


@triton.jit
def _derive(z, slope, ACT: tl.constexpr):
    """Return act'(z)."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACT == "leaky_relu":
        return tl.where(z <= 0, slope, 1.0)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    else:
        return z * 0.0 + 1.0


@triton.jit
def norm_moments_kernel(p_x, p_parts, count, splits, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute over the split's rows ``parts[0, split] = mean`` and ``parts[1, split] = sum (x - mean)^2``.

    Each value of a tile follows its own mean (Welford 1962); they are merged at the end (Chan et al. 1979).
    """
    split = tl.program_id(0)
    o_m = split * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mean, m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    seen = 0.0
    for r in range(split * BLOCK_M, count, splits * BLOCK_M):
        o_m = r + tl.arange(0, BLOCK_M)
        m_x = (o_m < count)[:, None] & m_c
        b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * channels + o_c, mask=m_x, other=0.0).to(tl.float32)
        seen += 1.0
        away = tl.where(m_x, b_x - mean, 0.0)
        mean += away * (1.0 / seen)
        m2 += away * tl.where(m_x, b_x - mean, 0.0)
    rows = tl.where(o_m < count, seen, seen - 1.0)[:, None]  # only the last tile may lack rows
    total = tl.sum(rows, 0)
    share = rows / total
    center = tl.sum(mean * share, 0)
    center += tl.sum((mean - center) * share, 0)  # what rounding left
    away = mean - center
    at = split * channels + o_c
    tl.store(p_parts + at, center, mask=m_c)
    tl.store(p_parts + splits * channels + at, tl.sum(m2 + away * away * rows, 0), mask=m_c)


@triton.jit
def norm_combine_kernel(
    p_parts, p_mean, p_var, count, splits, channels, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Compute ``mean`` and biased ``var`` of all rows from the moments of the splits, of which none is left out.

    Split s has every ``splits``-th tile of ``ROWS`` rows, from tile s on.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s = tl.arange(0, BLOCK_S)
    m_c = o_c < channels
    tiles = tl.cdiv(count, ROWS)
    rows = tl.cdiv(tiles - o_s, splits) * ROWS - tl.where(o_s == (tiles - 1) % splits, tiles * ROWS - count, 0)
    share = tl.where(o_s < splits, rows.to(tl.float32) / count, 0.0)[:, None]
    at, m_s = o_s[:, None] * channels + o_c, (o_s < splits)[:, None] & m_c
    first = tl.load(p_parts + o_c, mask=m_c, other=0.0)  # differences from it keep their digits if |mean| is large
    away = tl.where(m_s, tl.load(p_parts + at, mask=m_s, other=0.0) - first, 0.0)
    shift = tl.sum(away * share, 0)
    away -= shift
    m2 = tl.load(p_parts + splits * channels + at, mask=m_s, other=0.0)
    tl.store(p_mean + o_c, first + shift, mask=m_c)
    tl.store(p_var + o_c, tl.sum(m2 / count + away * away * share, 0), mask=m_c)


@triton.jit
def norm_running_kernel(
    p_mean, p_var, p_running_mean, p_running_var, p_batches, channels, momentum, unbiased, BLOCK: tl.constexpr
):  # fmt: skip
    """Move the running statistics to ``mean`` and ``unbiased * var`` by the share ``momentum``; count the batch."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    mean = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(tl.float32) * (1.0 - momentum)
    var = tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(tl.float32) * (1.0 - momentum)
    mean += tl.load(p_mean + o_c, mask=m_c, other=0.0) * momentum
    var += tl.load(p_var + o_c, mask=m_c, other=0.0) * unbiased * momentum
    tl.store(p_running_mean + o_c, mean.to(p_running_mean.dtype.element_ty), mask=m_c)
    tl.store(p_running_var + o_c, var.to(p_running_var.dtype.element_ty), mask=m_c)
    if p_batches is not None:
        tl.store(p_batches, tl.load(p_batches) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def channel_statistics(p_mean, p_var, p_weight, p_bias, o_c, m_c, eps):
    """Return mean, rstd, weight and bias of the channels, float32; no weight is 1, no bias is 0."""
    mean = tl.load(p_mean + o_c, mask=m_c, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(p_var + o_c, mask=m_c, other=1.0).to(tl.float32) + eps)
    weight, bias = rstd * 0.0 + 1.0, rstd * 0.0
    if p_weight is not None:
        weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def _tile(program, count, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return channels, their mask, places in memory and theirs, of a program's tile.

    Tiles come last rows first: what the pass before has read last is still in the L2 cache.
    """
    o_m = (tl.cdiv(count, BLOCK_M) - 1 - program) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    return o_c, m_c, o_m.to(tl.int64)[:, None] * channels + o_c, (o_m < count)[:, None] & m_c


@triton.jit
def norm_apply_kernel(
    p_x, p_residual, p_y, p_mean, p_var, p_weight, p_bias, count, channels, eps, slope,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``y = act((x - mean) * rstd * weight + bias + residual)``."""
    o_c, m_c, at, m_x = _tile(tl.program_id(0), count, channels, BLOCK_M, BLOCK_C)
    mean, rstd, weight, bias = channel_statistics(p_mean, p_var, p_weight, p_bias, o_c, m_c, eps)
    z = (tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32) - mean) * rstd * weight + bias
    if p_residual is not None:
        z += tl.load(p_residual + at, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_y + at, _activate(z, slope, ACT).to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def norm_grad_sums_kernel(
    p_g, p_x, p_residual, p_gr, p_parts, p_mean, p_var, p_weight, p_bias, count, splits, channels, eps, slope,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``parts[0, split] = sum of d`` and ``parts[1, split] = sum of d * u`` over the split's rows; ``gr = d``.

    Where there is a residual, its gradient ``gr`` is all that the next pass needs of ``g`` and of the residual.
    """
    split = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mean, rstd, weight, bias = channel_statistics(p_mean, p_var, p_weight, p_bias, o_c, m_c, eps)
    sum_d = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_du = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(split * BLOCK_M, count, splits * BLOCK_M):
        o_m = r + tl.arange(0, BLOCK_M)
        m_x = (o_m < count)[:, None] & m_c
        at = o_m.to(tl.int64)[:, None] * channels + o_c
        u = (tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32) - mean) * rstd
        d = tl.load(p_g + at, mask=m_x, other=0.0).to(tl.float32)
        if p_residual is not None:
            z = u * weight + bias + tl.load(p_residual + at, mask=m_x, other=0.0).to(tl.float32)
            d *= _derive(z, slope, ACT)
            tl.store(p_gr + at, d.to(p_gr.dtype.element_ty), mask=m_x)
        else:
            d *= _derive(u * weight + bias, slope, ACT)
        sum_d += d
        sum_du += tl.where(m_x, d * u, 0.0)
    at = split * channels + o_c
    tl.store(p_parts + at, tl.sum(sum_d, 0), mask=m_c)
    tl.store(p_parts + splits * channels + at, tl.sum(sum_du, 0), mask=m_c)


@triton.jit
def norm_total_kernel(
    p_parts, p_first, p_second, p_third, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Compute the sums over splits of ``parts[0]``, ``[1]`` and ``[2]``, each ``(splits, C)``, in a fixed order."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s = tl.arange(0, BLOCK_S)
    m_c, i = o_c < channels, tl.program_id(1)
    parts = p_parts + (i * splits + o_s)[:, None] * channels + o_c
    total = tl.sum(tl.load(parts, mask=(o_s < splits)[:, None] & m_c, other=0.0), 0)
    if i == 0:
        tl.store(p_first + o_c, total, mask=m_c)
    if i == 1:
        tl.store(p_second + o_c, total, mask=m_c)
    if i == 2:
        tl.store(p_third + o_c, total, mask=m_c)


@triton.jit
def norm_grad_apply_kernel(
    p_x, p_g, p_gr, p_gx, p_sum_d, p_sum_du, p_mean, p_var, p_weight, p_bias, count, channels, eps, slope,
    ACT: tl.constexpr, BATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``gx = rstd * weight * (d - (sum d + u * sum d u) / M)``, no sums if not ``BATCH``; ``d = gr`` if any."""
    o_c, m_c, at, m_x = _tile(tl.program_id(0), count, channels, BLOCK_M, BLOCK_C)
    mean, rstd, weight, bias = channel_statistics(p_mean, p_var, p_weight, p_bias, o_c, m_c, eps)
    u = (tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32) - mean) * rstd
    if p_gr is not None:
        d = tl.load(p_gr + at, mask=m_x, other=0.0).to(tl.float32)
    else:
        d = tl.load(p_g + at, mask=m_x, other=0.0).to(tl.float32) * _derive(u * weight + bias, slope, ACT)
    if BATCH:
        sum_d, sum_du = tl.load(p_sum_d + o_c, mask=m_c, other=0.0), tl.load(p_sum_du + o_c, mask=m_c, other=0.0)
        d -= (sum_d + u * sum_du) / count
    tl.store(p_gx + at, (d * rstd * weight).to(p_gx.dtype.element_ty), mask=m_x)
