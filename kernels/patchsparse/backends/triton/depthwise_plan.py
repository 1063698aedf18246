"""Which source pixel meets which tap for every target pixel of a tile: known before a kernel runs.

A *tile* is a rectangle of target pixels that one program owns. What it reads lies in *source tiles*: its own and the
ones around it. All pixels of a source tile lie in one patch, so that one look-up serves them all, and a tile of an
inactive patch is skipped as a whole.

An axis ``A`` is the tuple of ``places.py`` with two more entries, ``(source, target, taps, stride, padding, dilation,
tile, transposed)``: the tile's target pixels along it, and whether the convolution is followed backwards. ``V`` is the
vertical one, ``H`` the horizontal one. Kernels call these functions while they are compiled; the results are constants.
"""

from __future__ import annotations

from triton import constexpr_function

__all__ = ["away", "pixels", "products", "reads", "source_side"]


@constexpr_function
def source_side(A):
    """Return the pixels of a source tile along an axis."""
    return A[6] // A[3] if A[7] else A[6] * A[3]


@constexpr_function
def reads(A):
    """Return all ``(away, pixel, tap, target)``: ``target`` reads at ``tap`` a pixel of the tile so far away."""
    _, _, count, stride, padding, dilation, tile, transposed = A
    side, found = source_side(A), []
    for tap in range(count):
        for target in range(tile):
            at = target + padding - tap * dilation if transposed else target * stride - padding + tap * dilation
            if not transposed or at % stride == 0:
                found.append((*divmod(at // stride if transposed else at, side), tap, target))
    return tuple(found)


@constexpr_function
def away(A):
    """Return how many tiles away the source tiles are, all between the first and the last that a tile reads."""
    found = [read[0] for read in reads(A)]
    return tuple(range(min(found), max(found) + 1))


@constexpr_function
def _reads_of(A, n):
    """Return ``(pixel, tap, target)`` of the reads that fall into the ``n``-th source tile."""
    far = away(A)[n]
    return tuple(read[1:] for read in reads(A) if read[0] == far)


@constexpr_function
def pixels(V, H, n, m):
    """Return the rows of the packed matrix that are read of source tile ``(n, m)``, counted from its first."""
    rows, columns = (sorted({read[0] for read in _reads_of(A, k)}) for A, k in ((V, n), (H, m)))
    return tuple(row * H[0] + column for row in rows for column in columns)


@constexpr_function
def products(V, H, n, m):
    """Return ``tap, target, pixel`` of all products with source tile ``(n, m)``, ordered by tap, in one flat tuple.

    ``target`` counts the tile's pixels, ``pixel`` those of :func:`pixels`.
    """
    place = {row: i for i, row in enumerate(pixels(V, H, n, m))}
    found = [
        (i * H[2] + j, v * H[6] + h, place[a * H[0] + b]) for a, i, v in _reads_of(V, n) for b, j, h in _reads_of(H, m)
    ]
    return tuple(value for product in sorted(found) for value in product)
