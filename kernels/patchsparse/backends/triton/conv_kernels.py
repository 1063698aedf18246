"""The convolution kernels: implicit GEMM over packed rows. One formula per kernel; launch code is in ``conv.py``.

Notation: ``r`` a target row, ``t`` a kernel tap, ``s(r, t)`` the source row that ``r`` reads at ``t`` (``places.py``)
or none if that pixel is inactive or outside. Local names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block.
"""

# The kernel language is not Python to a type checker: scalars are tensors, loops unroll, constants are wrapped.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .places import count_taps, first_tap, is_reached, place_of, row_of, source_row

__all__ = ["patch_conv2d_fwd_kernel", "patch_conv2d_wgrad_kernel", "sum_splits_kernel"]


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a @ b`` on tensor cores; ``"widened"`` is for Triton's interpreter, which misreads bfloat16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _taps_of_tile(o_m, m_m, kind, p_taps, V: tl.constexpr, H: tl.constexpr, KINDS_V: tl.constexpr,
                  KINDS_H: tl.constexpr, ORDERED: tl.constexpr):  # fmt: skip
    """Return the bit set (scalar int64) of taps that any row of the tile needs."""
    TAPS: tl.constexpr = V[2] * H[2]
    if ORDERED:
        return tl.reduce(tl.load(p_taps + o_m, mask=m_m, other=0), 0, _either)
    taps = kind.to(tl.int64) * 0
    for tap in tl.static_range(TAPS):
        if KINDS_V * KINDS_H == 1:
            taps += 1 << tap
        else:
            taps += is_reached(kind, tap, V, H, KINDS_V, KINDS_H) << tap
    return taps


@triton.jit
def patch_conv2d_fwd_kernel(
    p_x, p_w, p_bias, p_y, p_slot, p_coords, p_order, p_taps,
    count, rows, columns, C_IN, C_OUT, groups, w_group, w_first, w_out, w_tap, w_in,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr, KINDS_V: tl.constexpr, KINDS_H: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, n] = bias[n] + sum over t, k of x[s(r, t), k] * w[t, k, n]`` for a tile of rows and channels.

    One loop runs over the pairs (tap, block of k), so that loads of the next taps are in flight during the products;
    taps that no row of the tile needs are not in the loop. With ``TRANSPOSED`` this is the input gradient: x is the
    output gradient, k counts output channels, and pixels are taken by ``kind`` (position modulo the stride), whose
    taps are the same. With ``ORDERED`` rows come in the order of ``p_order`` and ``p_taps`` holds their tap bits.
    """
    tiles_n = tl.cdiv(C_OUT, BLOCK_N)
    group, kind = tl.program_id(1), tl.program_id(2)
    o_m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < count, o_n < C_OUT
    row = tl.load(p_order + o_m, mask=m_m, other=0) if ORDERED else row_of(o_m, V, H, kind, KINDS_V, KINDS_H)
    v, h, image, grid_v, grid_h = place_of(row, m_m, p_coords, V, H)
    taps = _taps_of_tile(o_m, m_m, kind, p_taps, V, H, KINDS_V, KINDS_H, ORDERED)
    steps = count_taps(taps, V[2] * H[2]) * tl.cdiv(C_IN, BLOCK_K)
    p_x += group * C_IN
    p_w += group * w_group + w_first

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tap, k = first_tap(taps), 0
    # Each step ends with the lookup for the next: so it is not in the chain of loads that Triton pipelines.
    source = source_row(tap, v, h, image, grid_v, grid_h, m_m, p_slot, rows, columns, V, H, TRANSPOSED)
    for _ in range(steps):
        m_k = k + o_k < C_IN
        at = source.to(tl.int64) * (groups * C_IN)
        b_x = tl.load(p_x + at[:, None] + (k + o_k), mask=(source >= 0)[:, None] & m_k, other=0.0)
        at = tap.to(tl.int64) * w_tap + (k + o_k) * w_in
        b_w = tl.load(p_w + at[:, None] + o_n * w_out, mask=m_k[:, None] & m_n, other=0.0)
        acc = _multiply(b_x, b_w, acc, PRECISION)
        k += BLOCK_K
        if k >= C_IN:
            k = 0
            taps &= taps - 1
            tap = first_tap(taps)
        source = source_row(tap, v, h, image, grid_v, grid_h, m_m, p_slot, rows, columns, V, H, TRANSPOSED)

    if p_bias is not None:
        acc += tl.load(p_bias + group * C_OUT + o_n, mask=m_n, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * (groups * C_OUT) + group * C_OUT
    tl.store(p_y + at[:, None] + o_n, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n)


@triton.jit
def _pair(o_r, end, tap, p_inputs, p_outputs, p_slot, p_coords, count, rows, columns,
          V: tl.constexpr, H: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    """Return (source row of x, row of the output gradient) for positions ``o_r``; a source < 0 adds nothing."""
    m_r = o_r < end
    if LISTED:
        at = tap.to(tl.int64) * count + o_r
        source = tl.load(p_inputs + at, mask=m_r, other=-1)
        target = tl.load(p_outputs + at, mask=m_r, other=0)
    else:
        v, h, image, grid_v, grid_h = place_of(o_r, m_r, p_coords, V, H)
        source = source_row(tap, v, h, image, grid_v, grid_h, m_r, p_slot, rows, columns, V, H, False)
        target = o_r
    return source, target


@triton.jit
def patch_conv2d_wgrad_kernel(
    p_x, p_g, p_part, p_slot, p_coords, p_inputs, p_outputs, p_pairs,
    count, rows, columns, C_IN, C_OUT, groups, splits,
    V: tl.constexpr, H: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``part[split, m, t, n] = sum over the split's rows r of g[r, m] * x[s(r, t), n]``.

    One program has one tap, one split of the rows, and a tile of output (m) and input (n) channels. Programs of one
    split run side by side, so its rows are read from memory once and from the L2 cache by the other taps.
    With ``LISTED`` the rows are the active pairs of the tap, ``p_pairs[t]`` in number, and nothing inactive is read.
    """
    TAPS: tl.constexpr = V[2] * H[2]
    tiles_m, tiles_n = tl.cdiv(C_OUT, BLOCK_M), tl.cdiv(C_IN, BLOCK_N)
    split = tl.program_id(0) // (TAPS * tiles_m * tiles_n)
    tile = tl.program_id(0) % (TAPS * tiles_m * tiles_n)
    tap, tile, group = tile % TAPS, tile // TAPS, tl.program_id(1)
    o_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < C_OUT, o_n < C_IN
    total = tl.load(p_pairs + tap) if LISTED else count
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_K) * BLOCK_K
    start, end = split * share, tl.minimum(total, (split + 1) * share)
    p_x += group * C_IN + o_n
    p_g += group * C_OUT + o_m

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    source, target = _pair(
        start + o_k, end, tap, p_inputs, p_outputs, p_slot, p_coords, count, rows, columns, V, H, LISTED
    )
    for r in range(start, end, BLOCK_K):
        m_k = (source >= 0)[:, None]
        b_g = tl.load(p_g + target.to(tl.int64)[:, None] * (groups * C_OUT), mask=m_k & m_m, other=0.0)
        b_x = tl.load(p_x + source.to(tl.int64)[:, None] * (groups * C_IN), mask=m_k & m_n, other=0.0)
        acc = _multiply(tl.trans(b_g), b_x, acc, PRECISION)
        source, target = _pair(
            r + BLOCK_K + o_k, end, tap, p_inputs, p_outputs, p_slot, p_coords, count, rows, columns, V, H, LISTED
        )

    at = (split.to(tl.int64) * groups * C_OUT + group * C_OUT + o_m) * TAPS + tap
    tl.store(p_part + at[:, None] * C_IN + o_n, acc, mask=m_m[:, None] & m_n)


@triton.jit
def sum_splits_kernel(p_part, p_w, count, splits, BLOCK: tl.constexpr):
    """Compute ``w[i] = sum over splits of part[split, i]`` in the order of the splits, always the same."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < count
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(p_part + o_i, mask=m_i, other=0.0)
        p_part += count
    tl.store(p_w + o_i, acc.to(p_w.dtype.element_ty), mask=m_i)
