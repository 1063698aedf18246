"""The shipped configurations: tile sizes, warps and stages per kernel; the first of a list is the default.

Every configuration listed here is compiled ahead of time in the tests for three architectures: none spills, all fit
into the shared memory of the smallest (163 KB, sm_80). Reasons for the numbers are in ``README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

__all__ = ["CONV", "FULL", "WGRAD", "Tile", "conv_tiles", "is_large", "stencil_tile", "wgrad_tiles"]


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work.

    Attributes:
        m: rows of the result (of the packed matrix; of the weight gradient: output channels).
        n: columns of the result (channels).
        k: length of one step of the sum.
        warps: per program.
        stages: of the software pipeline.
        sorted: take rows in the order of their active taps; for the weight gradient, take listed active pairs.
        waves: programs per multiprocessor that the weight gradient splits its rows into.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    sorted: bool = False
    waves: int = 2


# For 16-bit values; a step of float32 is half as long, which takes the same memory.
CONV = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(128, 64, 64, 8, 3),
    Tile(256, 64, 64, 8, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(128, 32, 64, 4, 4),
    Tile(128, 16, 64, 4, 4),
)
WGRAD = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 16, 64, 4, 3),
)
# Full float32 has no tensor cores: small tiles of plain multiply-adds, kept in registers.
FULL = (Tile(64, 64, 16, 4, 2), Tile(32, 64, 16, 4, 2), Tile(64, 32, 16, 8, 2), Tile(64, 16, 16, 4, 2))


def _power(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


def is_large(tile: Tile) -> bool:
    """Return whether a tile fills the registers: before sm_90, with float32, or with sorted rows, it would spill."""
    return tile.m * tile.n > 128 * 128 or tile.k > 64


def _adapt(tiles: tuple[Tile, ...], n: int, k: int, tensor_cores: bool, itemsize: int, large: bool) -> list[Tile]:
    """Return the tiles no wider than ``n`` channels need, with steps no longer than ``k``, without repetitions."""
    longest = 64 if itemsize == 2 or not tensor_cores else 32
    kept = [t for t in tiles if t.n <= _power(n) and ((large and itemsize == 2) or not is_large(t))]
    fitted = [replace(t, k=min(t.k * 2 // itemsize if tensor_cores else t.k, _power(k), 2 * longest)) for t in kept]
    return list(dict.fromkeys(fitted))


@lru_cache(maxsize=4096)
def conv_tiles(
    rows: int,
    c_in: int,
    c_out: int,
    itemsize: int,
    tensor_cores: bool,
    share: float,
    sortable: bool,
    large: bool = True,
) -> list[Tile]:
    """Return the configurations of the forward kernel and of the input gradient, the default first.

    Args:
        rows: of the result.
        c_in: channels summed over, per group.
        c_out: channels of the result, per group.
        itemsize: bytes per value.
        tensor_cores: whether products run on them (16 bit, or TF32).
        share: expected share of active (row, tap) pairs.
        sortable: whether an order of rows can be had.
        large: whether the device takes large tiles, sm_90 and later.
    """
    tiles = _adapt(CONV if tensor_cores else FULL, c_out, c_in, tensor_cores, itemsize, large)
    first = _best_conv(rows, c_out) if tensor_cores else (tiles[0].m, tiles[0].n)
    tiles.sort(key=lambda t: (t.m, t.n) != first)
    if not sortable:
        return tiles
    ordered = [replace(t, sorted=True) for t in tiles if not is_large(t)]
    if share < 0.75:  # sorting saves a quarter of the products or more
        return ordered + tiles[:1]
    return tiles + ordered[:2] if share < 0.9 else tiles


def _best_conv(rows: int, c_out: int) -> tuple[int, int]:
    """Return (m, n) of the default: as wide as the channels, and no larger than leaves three tiles per processor."""
    n = min(_power(c_out), 128)
    if n < 64:
        return 128, n
    if n == 64:
        return (256, 64) if rows >= 256 * 400 else (128, 64)
    return (128, 128) if rows * c_out >= 128 * 128 * 400 else (64, 128)


@lru_cache(maxsize=4096)
def wgrad_tiles(
    c_in: int, c_out: int, itemsize: int, tensor_cores: bool, share: float, large: bool = True
) -> list[Tile]:
    """Return the configurations of the weight gradient, the default first; channels are per group."""
    tiles = _adapt(WGRAD if tensor_cores else FULL, c_in, 1 << 30, tensor_cores, itemsize, large)
    fitting = [t for t in tiles if t.m <= max(64, _power(c_out))]
    tiles = fitting or tiles
    wide = (128 if _power(c_out) >= 128 else 64, min(_power(c_in), 128))
    if tensor_cores:
        tiles.sort(key=lambda t: (t.m, t.n) != wide)
    listed = [replace(t, sorted=True) for t in tiles]
    if share < 0.75:
        return listed + tiles[:1]
    return tiles + listed[:2] if share < 0.9 else tiles


@lru_cache
def stencil_tile(channels: int) -> Tile:
    """Return the tile of the memory-bound kernels: 64 to 128 bytes of neighbouring channels per row."""
    n = min(_power(channels), 64)
    return Tile(2048 // n, n, 1, 4, 1)
