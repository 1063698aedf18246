"""Where a row of a packed matrix lies, and which row a kernel tap reads, by arithmetic on addresses.

A packed tensor ``(N, C, ph, pw)`` in channels_last memory is a matrix of ``N * ph * pw`` rows of C values. Row ``r`` is
pixel ``r % (ph * pw)`` of patch ``r // (ph * pw)``. A tap moves the pixel, perhaps out of its patch; the patch that it
falls into is looked up in the slot map. Nothing here needs a table per row.

An *axis* is the tuple ``(source, target, taps, stride, padding, dilation)`` in pixels, a compile-time constant: patches
of ``source`` pixels are read, patches of ``target`` pixels are written, one axis for each direction. With
``TRANSPOSED`` the same convolution is followed backwards, from its input (target) to its outputs (source).
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from ...geometry import Stencil

__all__ = ["axes", "place_of", "row_of", "source_row"]

Size = tuple[int, int]


@lru_cache(maxsize=4096)
def axes(source: Size, target: Size, stencil: Stencil) -> dict[str, tuple[int, ...]]:
    """Return the constants V and H of a kernel that reads patches of ``source`` and writes ``target`` pixels."""
    parts = zip(source, target, stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, strict=True)
    return dict(zip("VH", parts, strict=True))


@triton.jit
def row_of(number, V: tl.constexpr, H: tl.constexpr, kind, KINDS_V: tl.constexpr, KINDS_H: tl.constexpr):
    """Return the target row of the ``number``-th pixel whose position is ``kind`` modulo (KINDS_V, KINDS_H)."""
    WIDE: tl.constexpr = H[1] // KINDS_H
    EACH: tl.constexpr = (V[1] // KINDS_V) * WIDE
    pixel = number % EACH
    v = pixel // WIDE * KINDS_V + kind // KINDS_H
    h = pixel % WIDE * KINDS_H + kind % KINDS_H
    return number // EACH * (V[1] * H[1]) + v * H[1] + h


@triton.jit
def place_of(row, m_row, p_coords, V: tl.constexpr, H: tl.constexpr):
    """Return pixel (v, h) of target rows, and image and (row, column) of their patches in the grid."""
    patch = row // (V[1] * H[1])
    pixel = row % (V[1] * H[1])
    image = tl.load(p_coords + patch * 3, mask=m_row, other=0)
    grid_v = tl.load(p_coords + patch * 3 + 1, mask=m_row, other=0)
    grid_h = tl.load(p_coords + patch * 3 + 2, mask=m_row, other=0)
    return pixel // H[1], pixel % H[1], image, grid_v, grid_h


@triton.jit
def _along(pixel, tap, A: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return (patches away, pixel in that patch, whether the tap hits a pixel at all) along one axis."""
    AWAY: tl.constexpr = (A[5] * (A[2] - 1) + A[4] + A[0] - 1) // A[0]  # keeps // and % off negative numbers
    if TRANSPOSED:
        at = pixel + (A[4] + AWAY * A[0] * A[3]) - tap * A[5]
        hit = at % A[3] == 0
        at = at // A[3]
    else:
        at = pixel * A[3] + (AWAY * A[0] - A[4]) + tap * A[5]
        hit = at >= 0
    return at // A[0] - AWAY, at % A[0], hit


@triton.jit
def source_row(
    tap, v, h, image, grid_v, grid_h, m_row, p_slot, rows, columns,
    V: tl.constexpr, H: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return the source row that each target row reads at ``tap``: -1 at an inactive patch, -2 beyond the image."""
    away_v, at_v, hit_v = _along(v, tap // H[2], V, TRANSPOSED)
    away_h, at_h, hit_h = _along(h, tap % H[2], H, TRANSPOSED)
    grid_v += away_v
    grid_h += away_h
    inside = m_row & (grid_v >= 0) & (grid_v < rows) & (grid_h >= 0) & (grid_h < columns) & hit_v & hit_h
    slot = tl.load(p_slot + (image * rows + grid_v) * columns + grid_h, mask=inside, other=-2)
    return tl.where(slot >= 0, slot * (V[0] * H[0]) + at_v * H[0] + at_h, slot)
