"""Depthwise convolution and the gradient of max-pooling, by tiles; launches in ``depthwise_pool.py``.

A program owns one tile of target pixels (``depthwise_plan.py``) of one patch, and ``BLOCK_C`` channels, and keeps all
its sums in registers. It reads which source tiles lie around it, a scalar each, from a table that the layers of a stage
share. Of an active one it reads every pixel once and adds all its products; an inactive one costs a comparison.
Everything is unrolled: which product adds to which sum is a constant.
"""

# The kernel language is not Python to a type checker: scalars are tensors, loops unroll, constants are wrapped.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# It does not know starred tuples either.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .depthwise_plan import away, pixels, products, source_side

__all__ = [
    "patch_depthwise_tile_fwd_kernel",
    "patch_depthwise_tile_wgrad_kernel",
    "patch_max_pool2d_tile_grad_kernel",
    "sum_parts_kernel",
]


@triton.jit
def _read(p, o_c, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a row of channels in float32, of taps in int32; no mask where blocks divide the channels."""
    WIDE: tl.constexpr = tl.int32 if p.dtype.element_ty == tl.uint8 else tl.float32
    if CHANNELS % BLOCK_C == 0:
        return tl.load(p + o_c).to(WIDE)
    else:
        return tl.load(p + o_c, mask=o_c < CHANNELS, other=0).to(WIDE)


@triton.jit
def _write(p, o_c, value, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store a row of channels in the type that ``p`` points to."""
    if CHANNELS % BLOCK_C == 0:
        tl.store(p + o_c, value.to(p.dtype.element_ty))
    else:
        tl.store(p + o_c, value.to(p.dtype.element_ty), mask=o_c < CHANNELS)


@triton.jit
def _first_row(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE_V: tl.constexpr, SIDE_H: tl.constexpr):
    """Return the packed row of the first pixel of a tile of SIDE_V x SIDE_H pixels, in patches of HEIGHT x WIDTH."""
    ACROSS: tl.constexpr = WIDTH // SIDE_H
    EACH: tl.constexpr = HEIGHT // SIDE_V * ACROSS
    at = tile % EACH
    return tl.cast(tile // EACH, tl.int64) * (HEIGHT * WIDTH) + at // ACROSS * (SIDE_V * WIDTH) + at % ACROSS * SIDE_H


@triton.jit
def _source_tiles(tile, p_sources, V: tl.constexpr, H: tl.constexpr):
    """Return the number of every source tile, negative if there is nothing to read."""
    SOURCES: tl.constexpr = len(away(V)) * len(away(H))
    found = ()
    for n in tl.static_range(SOURCES):
        found = found + (tl.load(p_sources + tl.cast(tile, tl.int64) * SOURCES + n),)
    return found


@triton.jit
def _read_pixels(
    p_x, source, o_c, n: tl.constexpr, m: tl.constexpr,
    V: tl.constexpr, H: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the values of all pixels that are read of source tile ``(n, m)``, whose number is ``source``."""
    p_first = p_x + _first_row(source, V[0], H[0], source_side(V), source_side(H)) * CHANNELS
    x = ()
    for k in tl.static_range(len(pixels(V, H, n, m))):
        x = x + (_read(p_first + pixels(V, H, n, m)[k] * CHANNELS, o_c, CHANNELS, BLOCK_C),)
    return x


@triton.jit
def _add_taps(acc, x, w, p_w, o_c, PRODUCTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return ``acc`` with ``acc[target] += x[pixel] * w[tap]`` for all products; reads each weight if w is None."""
    for k in tl.static_range(0, len(PRODUCTS), 3):
        if w is not None:
            b_w = w[PRODUCTS[k]]
        elif k == 0 or PRODUCTS[k] != PRODUCTS[k - 3]:
            b_w = _read(p_w + PRODUCTS[k] * CHANNELS, o_c, CHANNELS, BLOCK_C)
        total = tl.fma(x[PRODUCTS[k + 2]], b_w, acc[PRODUCTS[k + 1]])
        acc = acc[: PRODUCTS[k + 1]] + (total,) + acc[PRODUCTS[k + 1] + 1 :]
    return acc


@triton.jit
def _add_pixels(acc, x, g, PRODUCTS: tl.constexpr):
    """Return ``acc`` with ``acc[tap] += x[pixel] * g[target]`` for all products."""
    for k in tl.static_range(0, len(PRODUCTS), 3):
        total = tl.fma(x[PRODUCTS[k + 2]], g[PRODUCTS[k + 1]], acc[PRODUCTS[k]])
        acc = acc[: PRODUCTS[k]] + (total,) + acc[PRODUCTS[k] + 1 :]
    return acc


@triton.jit
def _add_won(acc, g, won, PRODUCTS: tl.constexpr):
    """Return ``acc`` with ``acc[target] += g[pixel]`` wherever the tap of a product is the one that ``won``."""
    for k in tl.static_range(0, len(PRODUCTS), 3):
        share = tl.where(won[PRODUCTS[k + 2]] == PRODUCTS[k], g[PRODUCTS[k + 2]], 0.0)
        acc = acc[: PRODUCTS[k + 1]] + (acc[PRODUCTS[k + 1]] + share,) + acc[PRODUCTS[k + 1] + 1 :]
    return acc


@triton.jit
def patch_depthwise_tile_fwd_kernel(
    p_x, p_w, p_bias, p_y, p_sources,
    V: tl.constexpr, H: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, c] = bias[c] + sum over t of x[s(r, t), c] * w[t, c]``; w is float32, ``(taps, C)``.

    With ``KEEP`` the weights of all taps stay in registers; else each source tile reads those that it needs.
    """
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // BLOCKS
    sources = _source_tiles(tile, p_sources, V, H)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if p_bias is not None:
        bias += _read(p_bias, o_c, CHANNELS, BLOCK_C)
    acc = ()
    for _ in tl.static_range(V[6] * H[6]):
        acc = acc + (bias,)
    w = None
    if KEEP:
        w = ()
        for t in tl.static_range(V[2] * H[2]):
            w = w + (_read(p_w + t * CHANNELS, o_c, CHANNELS, BLOCK_C),)
    for n in tl.static_range(len(away(V))):
        for m in tl.static_range(len(away(H))):
            source = sources[n * len(away(H)) + m]
            if source >= 0:
                x = _read_pixels(p_x, source, o_c, n, m, V, H, CHANNELS, BLOCK_C)
                acc = _add_taps(acc, x, w, p_w, o_c, products(V, H, n, m), CHANNELS, BLOCK_C)
    p_first = p_y + _first_row(tile, V[1], H[1], V[6], H[6]) * CHANNELS
    for k in tl.static_range(V[6] * H[6]):
        _write(p_first + (k // H[6] * H[1] + k % H[6]) * CHANNELS, o_c, acc[k], CHANNELS, BLOCK_C)


@triton.jit
def patch_depthwise_tile_wgrad_kernel(
    p_x, p_g, p_part, p_sources, tiles, splits,
    V: tl.constexpr, H: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``part[split, t, c] = sum over the split's rows r of g[r, c] * x[s(r, t), c]``, tile after tile."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    TAPS: tl.constexpr = V[2] * H[2]
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0) // BLOCKS
    acc = ()
    for _ in tl.static_range(TAPS):
        acc = acc + (tl.zeros((BLOCK_C,), tl.float32),)
    for tile in range(split, tiles, splits):
        sources = _source_tiles(tile, p_sources, V, H)
        p_first = p_g + _first_row(tile, V[1], H[1], V[6], H[6]) * CHANNELS
        g = ()
        for k in tl.static_range(V[6] * H[6]):
            g = g + (_read(p_first + (k // H[6] * H[1] + k % H[6]) * CHANNELS, o_c, CHANNELS, BLOCK_C),)
        for n in tl.static_range(len(away(V))):
            for m in tl.static_range(len(away(H))):
                source = sources[n * len(away(H)) + m]
                if source >= 0:
                    x = _read_pixels(p_x, source, o_c, n, m, V, H, CHANNELS, BLOCK_C)
                    acc = _add_pixels(acc, x, g, products(V, H, n, m))
    p_split = p_part + split.to(tl.int64) * (TAPS * CHANNELS)
    for t in tl.static_range(TAPS):
        _write(p_split + t * CHANNELS, o_c, acc[t], CHANNELS, BLOCK_C)


@triton.jit
def patch_max_pool2d_tile_grad_kernel(
    p_g, p_tap, p_y, p_sources,
    V: tl.constexpr, H: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, c] = sum over t of g[s(r, t), c] where tap[s(r, t), c] = t``: each output is read once."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // BLOCKS
    sources = _source_tiles(tile, p_sources, V, H)
    acc = ()
    for _ in tl.static_range(V[6] * H[6]):
        acc = acc + (tl.zeros((BLOCK_C,), tl.float32),)
    for n in tl.static_range(len(away(V))):
        for m in tl.static_range(len(away(H))):
            source = sources[n * len(away(H)) + m]
            if source >= 0:
                g = _read_pixels(p_g, source, o_c, n, m, V, H, CHANNELS, BLOCK_C)
                won = _read_pixels(p_tap, source, o_c, n, m, V, H, CHANNELS, BLOCK_C)
                acc = _add_won(acc, g, won, products(V, H, n, m))
    p_first = p_y + _first_row(tile, V[1], H[1], V[6], H[6]) * CHANNELS
    for k in tl.static_range(V[6] * H[6]):
        _write(p_first + (k // H[6] * H[1] + k % H[6]) * CHANNELS, o_c, acc[k], CHANNELS, BLOCK_C)


@triton.jit
def sum_parts_kernel(
    p_part, p_w, splits, channels, TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Compute ``w[c, t] = sum over splits of part[split, t, c]``, always in the same order."""
    tap = tl.program_id(0) % TAPS
    o_c = tl.program_id(0) // TAPS * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s, m_c = tl.arange(0, BLOCK_S), o_c < channels
    acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        at = ((first + o_s).to(tl.int64) * TAPS + tap) * channels
        acc += tl.load(p_part + at[:, None] + o_c, mask=(first + o_s < splits)[:, None] & m_c, other=0.0)
    tl.store(p_w + o_c * TAPS + tap, tl.sum(acc, 0).to(p_w.dtype.element_ty), mask=m_c)
