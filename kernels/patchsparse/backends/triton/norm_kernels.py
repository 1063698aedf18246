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
def norm_moments_kernel(
    p_x, p_mean, p_m2, count, share, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Compute for the split's rows ``mean = sum x / n`` and ``m2 = sum (x - mean)^2``, merging blocks as Chan et al."""
    split = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    end = tl.minimum(count, (split + 1) * share)
    mean, m2 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for r in range(split * share, end, BLOCK_M):
        o_m = r + tl.arange(0, BLOCK_M)
        m_x = (o_m < end)[:, None] & m_c
        b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * channels + o_c, mask=m_x, other=0.0).to(tl.float32)
        before, here = r - split * share, tl.minimum(end - r, BLOCK_M)
        b_mean = tl.sum(b_x, 0) / here
        b_mean += tl.sum(tl.where(m_x, b_x - b_mean, 0.0), 0) / here  # what rounding left
        away = tl.where(m_x, b_x - b_mean, 0.0)
        delta, weight = b_mean - mean, here / (before + here)
        mean += delta * weight
        m2 += tl.sum(away * away, 0) + delta * delta * before * weight
    tl.store(p_mean + split * channels + o_c, mean, mask=m_c)
    tl.store(p_m2 + split * channels + o_c, m2, mask=m_c)


@triton.jit
def norm_combine_kernel(
    p_means, p_m2s, p_mean, p_var, count, share, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Compute ``mean`` and biased ``var`` of all rows from the moments of the splits, in a fixed order."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    first = tl.load(p_means + o_c, mask=m_c, other=0.0)  # differences from it keep their digits if |mean| is large
    mean = tl.zeros((BLOCK_C,), tl.float32)
    for s in range(0, splits, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        rows = tl.where(o_s < splits, tl.minimum(share, count - o_s * share), 0).to(tl.float32)
        m_s = (o_s < splits)[:, None] & m_c
        means = tl.load(p_means + o_s[:, None] * channels + o_c, mask=m_s, other=0.0)
        mean += tl.sum((means - first) * (rows / count)[:, None], 0)
    mean += first
    var = tl.zeros((BLOCK_C,), tl.float32)
    for s in range(0, splits, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        rows = tl.where(o_s < splits, tl.minimum(share, count - o_s * share), 0).to(tl.float32)
        m_s = (o_s < splits)[:, None] & m_c
        delta = tl.load(p_means + o_s[:, None] * channels + o_c, mask=m_s, other=0.0) - mean
        m2 = tl.load(p_m2s + o_s[:, None] * channels + o_c, mask=m_s, other=0.0)
        var += tl.sum(m2 / count + delta * delta * (rows / count)[:, None], 0)
    tl.store(p_mean + o_c, mean, mask=m_c)
    tl.store(p_var + o_c, var, mask=m_c)


@triton.jit
def channel_statistics(p_mean, p_rstd, p_weight, p_bias, o_c, m_c):
    """Return mean, rstd, weight and bias of the channels, float32; no weight is 1, no bias is 0."""
    mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)
    rstd = tl.load(p_rstd + o_c, mask=m_c, other=0.0)
    weight, bias = rstd * 0.0 + 1.0, rstd * 0.0
    if p_weight is not None:
        weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def norm_apply_kernel(
    p_x, p_residual, p_y, p_mean, p_rstd, p_weight, p_bias, count, channels, slope,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``y = act((x - mean) * rstd * weight + bias + residual)``."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mean, rstd, weight, bias = channel_statistics(p_mean, p_rstd, p_weight, p_bias, o_c, m_c)
    at, m_x = o_m.to(tl.int64)[:, None] * channels + o_c, (o_m < count)[:, None] & m_c
    z = (tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32) - mean) * rstd * weight + bias
    if p_residual is not None:
        z += tl.load(p_residual + at, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_y + at, _activate(z, slope, ACT).to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def _chain(p_g, p_x, p_residual, p_mean, p_rstd, p_weight, p_bias, at, o_c, m_x, m_c, slope, ACT: tl.constexpr):
    """Return ``d = grad * act'(z)`` (0 beyond the rows), ``u`` and ``rstd * weight``."""
    mean, rstd, weight, bias = channel_statistics(p_mean, p_rstd, p_weight, p_bias, o_c, m_c)
    u = (tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32) - mean) * rstd
    z = u * weight + bias
    if p_residual is not None:
        z += tl.load(p_residual + at, mask=m_x, other=0.0).to(tl.float32)
    d = tl.load(p_g + at, mask=m_x, other=0.0).to(tl.float32) * _derive(z, slope, ACT)
    return d, tl.where(m_x, u, 0.0), rstd * weight


@triton.jit
def norm_grad_sums_kernel(
    p_g, p_x, p_residual, p_sums, p_mean, p_rstd, p_weight, p_bias, count, share, splits, channels, slope,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``sums[0, split] = sum of d`` and ``sums[1, split] = sum of d * u`` over the split's rows."""
    split = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    end = tl.minimum(count, (split + 1) * share)
    sum_d = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_du = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(split * share, end, BLOCK_M):
        o_m = r + tl.arange(0, BLOCK_M)
        m_x = (o_m < end)[:, None] & m_c
        at = o_m.to(tl.int64)[:, None] * channels + o_c
        d, u, _ = _chain(p_g, p_x, p_residual, p_mean, p_rstd, p_weight, p_bias, at, o_c, m_x, m_c, slope, ACT)
        sum_d += d
        sum_du += d * u
    tl.store(p_sums + split * channels + o_c, tl.sum(sum_d, 0), mask=m_c)
    tl.store(p_sums + (splits + split) * channels + o_c, tl.sum(sum_du, 0), mask=m_c)


@triton.jit
def norm_total_kernel(p_parts, p_total, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute ``total[i] = sum over splits of parts[i, split]`` in a fixed order; ``parts`` is (n, splits, C)."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    first = tl.program_id(1) * splits
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s in range(0, splits, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        m_s = (o_s < splits)[:, None] & m_c
        total += tl.load(p_parts + (first + o_s)[:, None] * channels + o_c, mask=m_s, other=0.0)
    tl.store(p_total + tl.program_id(1) * channels + o_c, tl.sum(total, 0), mask=m_c)


@triton.jit
def norm_grad_apply_kernel(
    p_g, p_x, p_residual, p_gx, p_gr, p_total, p_mean, p_rstd, p_weight, p_bias, count, channels, slope,
    ACT: tl.constexpr, BATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``gx = rstd * weight * (d - (sum d + u * sum d u) / M)`` (no sums if not ``BATCH``) and ``gr = d``."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    at, m_x = o_m.to(tl.int64)[:, None] * channels + o_c, (o_m < count)[:, None] & m_c
    d, u, scale = _chain(p_g, p_x, p_residual, p_mean, p_rstd, p_weight, p_bias, at, o_c, m_x, m_c, slope, ACT)
    if p_residual is not None:
        tl.store(p_gr + at, d.to(p_gr.dtype.element_ty), mask=m_x)
    if BATCH:
        mean_d = tl.load(p_total + o_c, mask=m_c, other=0.0) / count
        mean_du = tl.load(p_total + channels + o_c, mask=m_c, other=0.0) / count
        d -= mean_d + u * mean_du
    tl.store(p_gx + at, (d * scale).to(p_gx.dtype.element_ty), mask=m_x)
