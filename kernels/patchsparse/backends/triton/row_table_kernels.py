"""Kernels that build row tables (``row_tables.py``): a program takes some target rows and looks up all their sources.

``V`` and ``H`` are the axes of ``places.py``, a set of taps is a bit of an int64 for each. Local names as in
``conv_kernels.py``.
"""

# The kernel language is not Python to a type checker: scalars are tensors, loops unroll, constants are wrapped.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .places import place_of, row_of, source_row

__all__ = [
    "listed_rows_kernel",
    "listed_taps_kernel",
    "needed_taps_kernel",
    "row_table_kernel",
    "sorted_row_table_kernel",
    "tap_ranks_kernel",
]


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _look_up(
    row, m_row, first, taps, p_sources, at, step, p_slot, p_coords, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return the set of those of ``taps`` taps from ``first`` on at which target rows have a source.

    With ``p_sources``, write the source at the t-th of them, -1 if there is none, to ``p_sources[at + t * step]``.
    """
    v, h, image, grid_v, grid_h = place_of(row, m_row, p_coords, V, H)
    found = row.to(tl.int64) * 0
    for tap in range(taps):
        source = source_row(first + tap, v, h, image, grid_v, grid_h, m_row, p_slot, rows, columns, V, H, TRANSPOSED)
        found += (source >= 0).to(tl.int64) << tap
        if p_sources is not None:
            tl.store(p_sources + at, tl.maximum(source, -1), mask=m_row)
            p_sources += step
    return found


@triton.jit
def row_table_kernel(
    p_sources, p_order, p_taps, p_slot, p_coords, count, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr, KINDS_V: tl.constexpr, KINDS_H: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the table of rows in their own order, or with kinds (positions modulo) those of a kind together."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < count
    each = count // (KINDS_V * KINDS_H)
    row = row_of(o_i % each, V, H, o_i // each, KINDS_V, KINDS_H)
    taps = _look_up(row, m_i, 0, V[2] * H[2], p_sources, o_i, count, p_slot, p_coords, rows, columns, V, H, TRANSPOSED)
    if p_order is not None:
        tl.store(p_order + o_i, row, mask=m_i)
        tl.store(p_taps + o_i, taps, mask=m_i)


@triton.jit
def tap_ranks_kernel(
    p_ranks, p_slot, p_coords, count, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the place of each row's set of taps in the Gray code, where neighbours differ in one bit."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < count
    rank = _look_up(o_i, m_i, 0, V[2] * H[2], None, o_i, count, p_slot, p_coords, rows, columns, V, H, TRANSPOSED)
    for shift in tl.static_range(6):
        rank ^= rank >> (1 << shift)
    tl.store(p_ranks + o_i, rank.to(p_ranks.dtype.element_ty), mask=m_i)


@triton.jit
def _set_at(rank):
    """Return the set of taps at a place of the Gray code."""
    return rank.to(tl.int64) ^ (rank.to(tl.int64) >> 1)


@triton.jit
def needed_taps_kernel(p_ranks, p_needed, TAPS: tl.constexpr, GROUP: tl.constexpr):
    """Compute how many taps each group of rows needs, whose sets have ``p_ranks``; one program for each group."""
    taps = _set_at(tl.load(p_ranks + tl.program_id(0) * GROUP + tl.arange(0, GROUP)))
    taps = tl.reduce(taps, 0, _either)
    needed = 0
    for tap in range(TAPS):
        needed += ((taps >> tap) & 1).to(tl.int32)
    tl.store(p_needed + tl.program_id(0), needed)


@triton.jit
def sorted_row_table_kernel(
    p_sources, p_order, p_taps, p_rows, p_ranks, p_needed, p_slot, p_coords, count, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the table of rows sorted by rank; a group takes its place after those that need more taps.

    One program writes one group. The rows beyond the last whole group stay last.
    """
    own, groups = tl.program_id(0), count // GROUP
    place = own
    if own < groups:
        needed = tl.load(p_needed + own)
        place = 0
        for start in range(0, groups, BLOCK):
            other = start + tl.arange(0, BLOCK)
            more = tl.load(p_needed + other, mask=other < groups, other=-1)
            place += tl.sum(((more > needed) | ((more == needed) & (other < own))).to(tl.int32), 0)
    o_i, o_g = own * GROUP + tl.arange(0, GROUP), place * GROUP + tl.arange(0, GROUP)
    m_i = o_i < count
    row = tl.load(p_rows + o_i, mask=m_i, other=0).to(tl.int32)
    tl.store(p_order + o_g, row, mask=m_i)
    tl.store(p_taps + o_g, _set_at(tl.load(p_ranks + o_i, mask=m_i, other=0)), mask=m_i)
    _look_up(row, m_i, 0, V[2] * H[2], p_sources, o_g, count, p_slot, p_coords, rows, columns, V, H, TRANSPOSED)


@triton.jit
def listed_taps_kernel(
    p_listed, p_slot, p_coords, count, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``listed[g, i]`` = 1 if row i has a source at one of the taps of group g, else 0."""
    o_i, group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    m_i = o_i < count
    first = group * TOGETHER
    taps = _look_up(o_i, m_i, first, TOGETHER, None, o_i, count, p_slot, p_coords, rows, columns, V, H, False)
    tl.store(p_listed + group.to(tl.int64) * count + o_i, (taps != 0).to(tl.int8), mask=m_i)


@triton.jit
def listed_rows_kernel(
    p_sources, p_targets, p_counts, p_ends, p_slot, p_coords, count, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the listed rows of each group in ascending order, then the others; ``ends`` are running sums of listed."""
    o_i, group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    m_i = o_i < count
    p_ends += group * count
    total = tl.load(p_ends + count - 1)
    end = tl.load(p_ends + o_i, mask=m_i, other=0)
    before = tl.load(p_ends + o_i - 1, mask=m_i & (o_i > 0), other=0)
    at = tl.where(end > before, before, total + o_i - end)
    tl.store(p_targets + group * count + at, o_i, mask=m_i)
    tl.store(p_counts + group, total, mask=tl.program_id(0) == 0)
    first = tl.program_id(1) * TOGETHER
    p_sources += group * TOGETHER * count
    _look_up(o_i, m_i, first, TOGETHER, p_sources, at, count, p_slot, p_coords, rows, columns, V, H, False)
