"""Max-pooling, and depthwise convolution with any kernel, over packed rows; launches in ``depthwise_pool.py``.

Notation as in ``conv_kernels.py``. Each program owns a tile of target rows and channels and visits the taps in a loop;
sums are kept in float32. Depthwise kernels of usual sizes run in ``depthwise_kernels.py``.
"""

# The kernel language is not Python to a type checker: scalars are tensors, loops unroll, constants are wrapped.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .places import place_of, source_row

__all__ = [
    "patch_depthwise_fwd_kernel",
    "patch_depthwise_wgrad_kernel",
    "patch_max_pool2d_fwd_kernel",
    "patch_max_pool2d_grad_kernel",
]


@triton.jit
def patch_depthwise_fwd_kernel(
    p_x, p_w, p_bias, p_y, p_slot, p_coords,
    count, rows, columns, channels,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, c] = bias[c] + sum over t of x[s(r, t), c] * w[t, c]``; with ``TRANSPOSED`` the input gradient.

    w is float32, ``(taps, C)``.
    """
    TAPS_H: tl.constexpr = H[2]
    tiles_c = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // tiles_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = row < count, o_c < channels
    v, h, image, grid_v, grid_h = place_of(row, m_m, p_coords, V, H)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if p_bias is not None:
        acc += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i in range(V[2]):
        for j in tl.static_range(TAPS_H):  # unrolled, so that the loads of a kernel row are in flight together
            tap = i * TAPS_H + j
            source = source_row(tap, v, h, image, grid_v, grid_h, m_m, p_slot, rows, columns, V, H, TRANSPOSED)
            at = source.to(tl.int64) * channels
            b_x = tl.load(p_x + at[:, None] + o_c, mask=(source >= 0)[:, None] & m_c, other=0.0)
            b_w = tl.load(p_w + tap * channels + o_c, mask=m_c, other=0.0)
            acc += b_x.to(tl.float32) * b_w
    tl.store(p_y + row.to(tl.int64)[:, None] * channels + o_c, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c)


@triton.jit
def patch_depthwise_wgrad_kernel(
    p_x, p_g, p_part, p_slot, p_coords,
    count, rows, columns, channels, splits,
    V: tl.constexpr, H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``part[split, t, c] = sum over the split's rows r of g[r, c] * x[s(r, t), c]``.

    One program has one row of the kernel: its taps (``BLOCK_J``, a power of two) share each load of g.
    """
    tiles_c = tl.cdiv(channels, BLOCK_C)
    i = tl.program_id(0) % V[2]
    o_c = (tl.program_id(0) // V[2] % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0) // (V[2] * tiles_c)
    o_j = tl.arange(0, BLOCK_J)
    tap = i * H[2] + o_j
    m_j, m_c = o_j < H[2], o_c < channels
    share = tl.cdiv(tl.cdiv(count, splits), BLOCK_M) * BLOCK_M
    start, end = split * share, tl.minimum(count, (split + 1) * share)
    acc = tl.zeros((BLOCK_J, BLOCK_M, BLOCK_C), tl.float32)
    for r in range(start, end, BLOCK_M):
        row = r + tl.arange(0, BLOCK_M)
        m_m = row < end
        v, h, image, grid_v, grid_h = place_of(row, m_m, p_coords, V, H)
        source = source_row(
            tap[:, None], v[None, :], h[None, :], image[None, :], grid_v[None, :], grid_h[None, :],
            m_j[:, None] & m_m[None, :], p_slot, rows, columns, V, H, False,
        )  # fmt: skip
        at = source.to(tl.int64) * channels
        b_x = tl.load(p_x + at[:, :, None] + o_c, mask=(source >= 0)[:, :, None] & m_c, other=0.0)
        b_g = tl.load(p_g + row.to(tl.int64)[:, None] * channels + o_c, mask=m_m[:, None] & m_c, other=0.0)
        acc += b_x.to(tl.float32) * b_g.to(tl.float32)[None, :, :]
    at = (split.to(tl.int64) * (V[2] * H[2]) + tap) * channels
    tl.store(p_part + at[:, None] + o_c, tl.sum(acc, 1), mask=m_j[:, None] & m_c)


@triton.jit
def patch_max_pool2d_fwd_kernel(
    p_x, p_y, p_tap, p_slot, p_coords, count, rows, columns, channels,
    V: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, c] = max over t of x[s(r, t), c]`` and its first tap: 0 where inactive, -inf outside."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // tiles_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = row < count, o_c < channels
    v, h, image, grid_v, grid_h = place_of(row, m_m, p_coords, V, H)
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for tap in range(V[2] * H[2]):
        source = source_row(tap, v, h, image, grid_v, grid_h, m_m, p_slot, rows, columns, V, H, False)
        at = source.to(tl.int64) * channels
        b_x = tl.load(p_x + at[:, None] + o_c, mask=(source >= 0)[:, None] & m_c, other=0.0).to(tl.float32)
        b_x = tl.where((source == -2)[:, None], float("-inf"), b_x)
        take = (b_x > best) | (b_x != b_x)
        best = tl.where(take, b_x, best)
        winner = tl.where(take, tap, winner)
    at = row.to(tl.int64)[:, None] * channels + o_c
    tl.store(p_y + at, best.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c)
    tl.store(p_tap + at, winner.to(tl.uint8), mask=m_m[:, None] & m_c)


@triton.jit
def patch_max_pool2d_grad_kernel(
    p_g, p_tap, p_y, p_slot, p_coords, count, rows, columns, channels,
    V: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, c] = sum over t of g[s(r, t), c] where tap[s(r, t), c] = t``: a pixel asks its stencils."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // tiles_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = row < count, o_c < channels
    v, h, image, grid_v, grid_h = place_of(row, m_m, p_coords, V, H)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in range(V[2] * H[2]):
        source = source_row(tap, v, h, image, grid_v, grid_h, m_m, p_slot, rows, columns, V, H, True)
        at = source.to(tl.int64)[:, None] * channels + o_c
        m_x = (source >= 0)[:, None] & m_c
        won = tl.load(p_tap + at, mask=m_x, other=255).to(tl.int32) == tap
        acc += tl.where(won, tl.load(p_g + at, mask=m_x, other=0.0).to(tl.float32), 0.0)
    tl.store(p_y + row.to(tl.int64)[:, None] * channels + o_c, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c)
