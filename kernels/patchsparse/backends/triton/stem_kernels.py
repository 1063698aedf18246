"""Kernels of convolutions with few input channels: cells with their halo, and products over overlapping footprints.

A *cell* is a block of ``stride x stride`` pixels, taken as one pixel of ``stride * stride * C`` channels. A convolution
of stride s is one of stride 1 over cells. A patch is written with the cells around it that its outputs read. So the
cells that an output reads along one row, its *footprint*, lie one behind the other in memory, and a product needs
neither the slot map nor masks. Launch code is in ``stem.py``.

An *axis* is ``(cells, before, reach, stride, padding, taps)``, a compile-time constant: cells of a patch, cells read
before an output's own, cells read in all, and what the convolution of pixels was. Local names as in
``conv_kernels.py``.
"""

# The kernel language is not Python to a type checker: scalars are tensors, loops unroll, constants are wrapped.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .conv_kernels import multiply

__all__ = [
    "patch_cell_weight_kernel",
    "patch_cells_kernel",
    "patch_footprint_fwd_kernel",
    "patch_footprint_wgrad_kernel",
    "sum_cell_splits_kernel",
]


@triton.jit
def patch_cells_kernel(
    p_x, p_cells, p_slot, p_coords, rows, columns,
    V: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute ``cells[patch, v, h, (a, b, c)] = x[slot of the patch there, stride * v + a, stride * h + b, c]``.

    One program writes some cells of one patch. Values are moved in units of up to 8 bytes, whatever their type: a row
    of pixels of a cell is ``RUN`` units, a cell ``UNITS``, of which the last may be filled up with 0.
    """
    WIDE: tl.constexpr = H[0] + H[2] - 1
    CELLS: tl.constexpr = (V[0] + V[2] - 1) * WIDE
    AWAY_V: tl.constexpr = (V[1] + V[0] - 1) // V[0]  # keeps // and % off negative numbers
    AWAY_H: tl.constexpr = (H[1] + H[0] - 1) // H[0]
    patch = tl.program_id(0)
    cell = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_u = tl.arange(0, BLOCK_N)
    v = cell // WIDE + (AWAY_V * V[0] - V[1])
    h = cell % WIDE + (AWAY_H * H[0] - H[1])
    image = tl.load(p_coords + patch * 3)
    grid_v = tl.load(p_coords + patch * 3 + 1) + v // V[0] - AWAY_V
    grid_h = tl.load(p_coords + patch * 3 + 2) + h // H[0] - AWAY_H
    inside = (cell < CELLS) & (grid_v >= 0) & (grid_v < rows) & (grid_h >= 0) & (grid_h < columns)
    slot = tl.load(p_slot + (image * rows + grid_v) * columns + grid_h, mask=inside, other=-1)
    pixel_row = (slot.to(tl.int64) * V[0] + v % V[0])[:, None] * V[3] + o_u // RUN
    at = (pixel_row * H[0] + (h % H[0])[:, None]) * RUN + o_u % RUN
    unit = tl.load(p_x + at, mask=(slot >= 0)[:, None] & (o_u < V[3] * RUN), other=0)
    at = (patch.to(tl.int64) * CELLS + cell)[:, None] * UNITS + o_u
    tl.store(p_cells + at, unit, mask=(cell < CELLS)[:, None] & (o_u < UNITS))


@triton.jit
def patch_cell_weight_kernel(
    p_w, p_out, count, C_IN, s_out, s_in, s_v, s_h,
    V: tl.constexpr, H: tl.constexpr, CELL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``out[n, v, h, (a, b, c)] = w[n, c, stride * v + a - shift, stride * h + b - shift]``, 0 beyond it."""
    LENGTH: tl.constexpr = H[2] * CELL
    SHIFT_V: tl.constexpr = V[1] * V[3] - V[4]
    SHIFT_H: tl.constexpr = H[1] * H[3] - H[4]
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, at = o_i // (V[2] * LENGTH), o_i % (V[2] * LENGTH)
    k, c = at % CELL // C_IN, at % CELL % C_IN
    v = at // LENGTH * V[3] + k // H[3] - SHIFT_V
    h = at % LENGTH // CELL * H[3] + k % H[3] - SHIFT_H
    inside = (o_i < count) & (k < V[3] * H[3]) & (v >= 0) & (v < V[5]) & (h >= 0) & (h < H[5])
    value = tl.load(p_w + n.to(tl.int64) * s_out + c * s_in + v * s_v + h * s_h, mask=inside, other=0.0)
    tl.store(p_out + o_i, value, mask=o_i < count)


@triton.jit
def _first_cell(row, V: tl.constexpr, H: tl.constexpr):
    """Return the first cell of the footprint of output rows."""
    WIDE: tl.constexpr = H[0] + H[2] - 1
    patch, v, h = row // (V[0] * H[0]), row // H[0] % V[0], row % H[0]
    return patch.to(tl.int64) * ((V[0] + V[2] - 1) * WIDE) + v * WIDE + h


@triton.jit
def _shift(k, H: tl.constexpr, CELL: tl.constexpr):
    """Return how far value ``k`` of a footprint lies behind the first."""
    LENGTH: tl.constexpr = H[2] * CELL
    return k // LENGTH * ((H[0] + H[2] - 1) * CELL) + k % LENGTH


@triton.jit
def patch_footprint_fwd_kernel(
    p_cells, p_w, p_bias, p_y, count, C_OUT,
    V: tl.constexpr, H: tl.constexpr, CELL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``y[r, n] = bias[n] + sum over k of cells[first(r) + shift(k)] * w[n, k]``."""
    TOTAL: tl.constexpr = V[2] * H[2] * CELL
    WHOLE: tl.constexpr = TOTAL % BLOCK_K == 0
    tiles_n = tl.cdiv(C_OUT, BLOCK_N)
    o_m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < count, o_n < C_OUT
    p_rows = p_cells + (_first_cell(tl.minimum(o_m, count - 1), V, H) * CELL)[:, None]
    p_w += tl.minimum(o_n, C_OUT - 1)[None, :] * TOTAL

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, TOTAL, BLOCK_K):
        k = start + o_k
        p_x, p_column = p_rows + _shift(k, H, CELL), p_w + k[:, None]
        if WHOLE:
            b_x, b_w = tl.load(p_x), tl.load(p_column)
        else:
            b_x = tl.load(p_x, mask=(k < TOTAL)[None, :], other=0.0)
            b_w = tl.load(p_column, mask=(k < TOTAL)[:, None], other=0.0)
        acc = multiply(b_x, b_w, acc, PRECISION)

    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + o_m.to(tl.int64)[:, None] * C_OUT + o_n, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n)


@triton.jit
def patch_footprint_wgrad_kernel(
    p_cells, p_g, p_part, count, C_OUT, splits,
    V: tl.constexpr, H: tl.constexpr, CELL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``part[split, m, k] = sum over the split's rows r of g[r, m] * cells[first(r) + shift(k)]``."""
    TOTAL: tl.constexpr = V[2] * H[2] * CELL
    ROWS: tl.constexpr = V[0] * H[0]
    # Whether a step takes whole patches, or whole lines of one: then its rows lie as those of the first step do.
    WHOLE: tl.constexpr = BLOCK_K % ROWS == 0 or (ROWS % BLOCK_K == 0 and BLOCK_K % H[0] == 0)
    tiles_m, tiles_n = tl.cdiv(C_OUT, BLOCK_M), (TOTAL + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    o_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < C_OUT, o_n < TOTAL
    share = tl.cdiv(tl.cdiv(count, splits), BLOCK_K) * BLOCK_K
    start, end = split * share, tl.minimum(count, (split + 1) * share)
    p_g += o_r.to(tl.int64)[:, None] * C_OUT + o_m
    p_cells += _shift(o_n, H, CELL)
    if WHOLE:
        p_cells += _first_cell(o_r, V, H)[:, None] * CELL

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row = start
    for _ in range(start, end, BLOCK_K):
        m_r = (row + o_r < end)[:, None]
        first = _first_cell(row, V, H) if WHOLE else _first_cell(row + o_r, V, H)[:, None]
        b_g = tl.load(p_g + row.to(tl.int64) * C_OUT, mask=m_r & m_m, other=0.0)
        b_x = tl.load(p_cells + first * CELL, mask=m_r & m_n, other=0.0)
        acc = multiply(tl.trans(b_g), b_x, acc, PRECISION)
        row += BLOCK_K

    at = (split.to(tl.int64) * C_OUT + o_m)[:, None] * TOTAL + o_n
    tl.store(p_part + at, acc, mask=m_m[:, None] & m_n)


@triton.jit
def sum_cell_splits_kernel(
    p_part, p_w, count, splits, size, C_IN,
    V: tl.constexpr, H: tl.constexpr, CELL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``w[n, v, h, c] = sum over splits`` of its value in ``part[split]``, in the order of the splits."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < count
    c, tap = o_i % C_IN, o_i // C_IN
    v = tap // H[5] % V[5] + (V[1] * V[3] - V[4])
    h = tap % H[5] + (H[1] * H[3] - H[4])
    at = ((tap // (V[5] * H[5]) * V[2] + v // V[3]) * H[2] + h // H[3]) * CELL
    p_part += at + (v % V[3] * H[3] + h % H[3]) * C_IN + c
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(p_part, mask=m_i, other=0.0)
        p_part += size
    tl.store(p_w + o_i, acc.to(p_w.dtype.element_ty), mask=m_i)
