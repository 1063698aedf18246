"""The convolution kernels: implicit GEMM over packed rows. One formula per kernel; launch code is in ``conv.py``.

Notation: ``r`` a target row, ``t`` a kernel tap, ``s(r, t)`` the source row that ``r`` reads at ``t``, or none if that
pixel is inactive or outside; a row table (``row_tables.py``) holds them. Local names: ``p_`` pointer, ``o_`` offsets,
``m_`` mask, ``b_`` block.

Channels and strides are compile-time constants: divisions, masks and multiplications vanish. Source rows are read two
taps (two steps) before they are used. They travel through ``tl.where``, because Triton pipelines no loop that hands a
value unchanged from one step to the next but one.
"""

# The kernel language is not Python to a type checker: scalars are tensors, loops unroll, constants are wrapped.
# ruff: noqa: RUF005 (it has no starred tuples)
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "multiply",
    "patch_conv2d_fwd_kernel",
    "patch_conv2d_wgrad_kernel",
    "round_to_tf32_kernel",
    "sum_splits_kernel",
]


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a @ b`` on tensor cores; ``"widened"`` is for Triton's interpreter, which misreads bfloat16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to_tf32_kernel(p_x, p_y, count, BLOCK: tl.constexpr):
    """Compute ``y[i]`` = ``x[i]`` to the nearest value with 10 bits of mantissa, ties away from 0; NaN stays NaN."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o_i, mask=o_i < count, other=0.0)
    nearest = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    tl.store(p_y + o_i, tl.where(x == x, nearest.to(tl.float32, bitcast=True), x), mask=o_i < count)


@triton.jit
def _count(taps, TAPS: tl.constexpr):
    """Return the number of set bits of a scalar."""
    count = 0
    for tap in tl.static_range(TAPS):
        count += ((taps >> tap) & 1).to(tl.int32)
    return count


@triton.jit
def _first(taps):
    """Return the lowest set bit of a scalar, negative if there is none: the exponent of that power of two."""
    lowest = (taps & -taps).to(tl.float32)
    return (lowest.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _sources_at(p_sources, tap, count, m_m):
    """Return the source rows of a tile at a tap; anything if there is no such tap or no such row."""
    return tl.load(p_sources + tap.to(tl.int64) * count, mask=m_m & (tap >= 0))


@triton.jit
def patch_conv2d_fwd_kernel(
    p_x, p_w, p_bias, p_y, p_sources, p_order, p_taps, count,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr, W: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, n] = bias[n] + sum over t, k of x[s(r, t), k] * w[t, k, n]`` for a tile of rows and channels.

    One loop runs over the pairs (tap, block of k), so that loads of the next taps are in flight during the products.
    Rows come in the order of the table; with one, ``p_taps`` holds their tap bits, and taps that no row of the tile
    needs are not in the loop. ``W`` are strides of w: of a group, of the first tap (an offset), of n, t and k.
    In the input gradient x is the output gradient and k counts output channels.
    """
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    TILES_K: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    group = tl.program_id(1)
    o_m = (tl.program_id(0) // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < count, o_n < C_OUT
    if p_order is None:
        taps = group.to(tl.int64) * 0 + ((1 << TAPS) - 1)
    else:
        taps = tl.reduce(tl.load(p_taps + o_m, mask=m_m, other=0), 0, _either)
    if TAPS < 32:
        taps = taps.to(tl.int32)
    steps = _count(taps, TAPS) * TILES_K
    p_x += group * C_IN
    p_w += group * W[0] + W[1] + o_k[:, None] * W[4] + o_n * W[2]
    p_sources += o_m

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tap, k = _first(taps), 0
    source = tl.where(m_m, _sources_at(p_sources, tap, count, m_m), -1)
    following = _sources_at(p_sources, _first(taps & (taps - 1)), count, m_m)
    for _ in range(steps):
        o_s = source[:, None]
        m_x, m_w = o_s >= 0, m_n[None, :]
        if C_IN % BLOCK_K != 0:
            m_k = k + o_k < C_IN
            m_x, m_w = m_x & m_k, m_w & m_k[:, None]
        b_x = tl.load(p_x + o_s.to(tl.int64) * (GROUPS * C_IN) + (k + o_k), mask=m_x, other=0.0)
        b_w = tl.load(p_w + (tap.to(tl.int64) * W[3] + k * W[4]), mask=m_w, other=0.0)
        acc = multiply(b_x, b_w, acc, PRECISION)
        if TILES_K == 1:
            taps &= taps - 1
            source = tl.where(m_m, following, -1)
        else:
            last = k + BLOCK_K >= C_IN
            k = tl.where(last, 0, k + BLOCK_K)
            taps = tl.where(last, taps & (taps - 1), taps)
            source = tl.where(m_m, tl.where(last, following, source), -1)
        tap = _first(taps)
        following = _sources_at(p_sources, _first(taps & (taps - 1)), count, m_m)

    if p_bias is not None:
        acc += tl.load(p_bias + group * C_OUT + o_n, mask=m_n, other=0.0).to(tl.float32)
    row = o_m if p_order is None else tl.load(p_order + o_m, mask=m_m, other=0)
    at = row.to(tl.int64) * (GROUPS * C_OUT) + group * C_OUT
    tl.store(p_y + at[:, None] + o_n, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n)


@triton.jit
def _pairs_at(p_sources, p_targets, o_r, end, count, TOGETHER: tl.constexpr):
    """Return the target rows at positions ``o_r`` and a tuple of their source rows at each tap; anything from end."""
    m_r = o_r < end
    target = o_r if p_targets is None else tl.load(p_targets + o_r, mask=m_r)
    sources = ()
    for t in tl.static_range(TOGETHER):
        sources = sources + (tl.load(p_sources + t * count + o_r, mask=m_r),)
    return target, sources


@triton.jit
def _none_from(end, o_r, target, sources, TOGETHER: tl.constexpr):
    """Return the same pairs, but none, -1, at positions from ``end``."""
    m_r = o_r < end
    kept = ()
    for t in tl.static_range(TOGETHER):
        kept = kept + (tl.where(m_r, sources[t], -1),)
    return tl.where(m_r, target, -1), kept


@triton.jit
def patch_conv2d_wgrad_kernel(
    p_x, p_g, p_part, p_sources, p_targets, p_counts, count, splits,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr, TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``part[split, m, t, n] = sum over the split's rows r of g[r, m] * x[s(r, t), n]``.

    One program has ``TOGETHER`` consecutive taps, for which g is read once, one split of the rows, and a tile of output
    (m) and input (n) channels. Programs of one split run side by side, so its rows are read from memory once and from
    the L2 cache by the others. With ``p_targets`` the rows are those listed for the group of taps, ``p_counts`` in
    number, else all.
    """
    FEWER: tl.constexpr = TAPS // TOGETHER
    TILES_M: tl.constexpr = (C_OUT + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (C_IN + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // (FEWER * TILES_M * TILES_N)
    tile = tl.program_id(0) % (FEWER * TILES_M * TILES_N)
    taps, tile, group = tile % FEWER, tile // FEWER, tl.program_id(1)
    o_m = (tile // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < C_OUT, o_n < C_IN
    total = count if p_targets is None else tl.load(p_counts + taps)
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_K) * BLOCK_K
    start, end = split * share, tl.minimum(total, (split + 1) * share)
    p_x += group * C_IN + o_n
    p_g += group * C_OUT + o_m
    p_sources += (taps * TOGETHER).to(tl.int64) * count
    if p_targets is not None:
        p_targets += taps.to(tl.int64) * count

    accs = ()
    for _ in tl.static_range(TOGETHER):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    o_r += start
    target, sources = _pairs_at(p_sources, p_targets, o_r, end, count, TOGETHER)
    target, sources = _none_from(end, o_r, target, sources, TOGETHER)
    o_r += BLOCK_K
    following, ahead = _pairs_at(p_sources, p_targets, o_r, end, count, TOGETHER)
    for _ in range(start, end, BLOCK_K):
        o_t = target[:, None]
        b_g = tl.load(p_g + o_t.to(tl.int64) * (GROUPS * C_OUT), mask=(o_t >= 0) & m_m, other=0.0)
        sums = ()
        for t in tl.static_range(TOGETHER):
            o_s = sources[t][:, None]
            b_x = tl.load(p_x + o_s.to(tl.int64) * (GROUPS * C_IN), mask=(o_s >= 0) & m_n, other=0.0)
            sums = sums + (multiply(tl.trans(b_g), b_x, accs[t], PRECISION),)
        accs = sums
        target, sources = _none_from(end, o_r, following, ahead, TOGETHER)
        o_r += BLOCK_K
        following, ahead = _pairs_at(p_sources, p_targets, o_r, end, count, TOGETHER)

    p_part += ((split.to(tl.int64) * GROUPS + group) * C_OUT * TAPS + taps * TOGETHER) * C_IN
    for t in tl.static_range(TOGETHER):
        part = accs[t].to(p_part.dtype.element_ty)
        tl.store(p_part + t * C_IN + (o_m[:, None] * (TAPS * C_IN) + o_n), part, mask=m_m[:, None] & m_n)


@triton.jit
def sum_splits_kernel(p_part, p_w, count, splits, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Compute ``w[i] = sum over splits of part[split, i]`` in an order that never changes.

    ``AT_ONCE`` sums are kept, each of every ``AT_ONCE``-th part, so that many parts are on their way from memory.
    """
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, AT_ONCE)
    m_i = o_i < count
    acc = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for split in range(0, splits, AT_ONCE):
        at = (split + o_s)[:, None].to(tl.int64) * count + o_i
        acc += tl.load(p_part + at, mask=(split + o_s < splits)[:, None] & m_i, other=0.0)
    tl.store(p_w + o_i, tl.sum(acc, 0).to(p_w.dtype.element_ty), mask=m_i)
