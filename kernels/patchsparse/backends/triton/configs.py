"""The shipped configurations: tile sizes, warps and stages per kernel, and which of them a device is offered.

Every configuration that is offered is compiled ahead of time in the tests: none spills, all fit into the shared memory
of the devices that it is offered to. Reasons for the numbers are in ``README.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

__all__ = [
    "CONV",
    "CONV_SMALL",
    "FULL",
    "LARGE",
    "WGRAD",
    "WGRAD_SMALL",
    "Tile",
    "capability",
    "conv_tiles",
    "memory_of",
    "programs_of",
    "shared_memory",
    "splits_of",
    "stencil_tile",
    "wgrad_tiles",
]

LARGE = 227 * 1024  # bytes of shared memory that a program may take where four warps share one product: sm_90, sm_100


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work.

    Attributes:
        m: rows of the result (of the packed matrix; of the weight gradient: output channels).
        n: columns of the result (channels).
        k: length of one step of the sum.
        warps: per program.
        stages: of the software pipeline; with one, values come through the L1 cache, which asynchronous copies pass by.
        sorted: take rows in the order of their active taps; for the weight gradient, take listed active pairs.
        taps: of the weight gradient, for which a program reads the output gradient once.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    sorted: bool = False
    taps: int = 1


# For 16-bit values; a step of float32 is half as long, which takes the same memory. In order of preference.
CONV = (
    Tile(128, 128, 64, 4, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(128, 32, 64, 4, 4),
    Tile(128, 16, 64, 4, 4),
    Tile(256, 64, 64, 4, 2),
    Tile(128, 64, 64, 4, 1),
    Tile(64, 256, 64, 4, 2),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
)
WGRAD = (
    Tile(128, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 3, taps=3),
    Tile(64, 64, 64, 4, 1, taps=3),
    Tile(64, 64, 64, 4, 2, taps=4),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 16, 64, 4, 4),
    Tile(128, 64, 64, 8, 3, taps=3),
    Tile(128, 256, 64, 8, 3),
)
# For devices with less shared memory, where each warp multiplies alone and keeps its operands in registers.
CONV_SMALL = (
    Tile(128, 128, 32, 8, 4),
    Tile(128, 64, 32, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(64, 64, 64, 4, 3),
    Tile(128, 32, 32, 4, 4),
    Tile(128, 16, 32, 4, 4),
)
WGRAD_SMALL = (
    Tile(128, 128, 32, 8, 4),
    Tile(64, 64, 32, 4, 3, taps=3),
    Tile(64, 128, 32, 4, 4),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 16, 64, 4, 4),
)
# Full float32 has no tensor cores: small tiles of plain multiply-adds, kept in registers.
FULL = (Tile(64, 64, 16, 4, 2), Tile(32, 64, 16, 4, 3), Tile(64, 32, 16, 8, 2), Tile(64, 16, 16, 4, 2))


# What Triton 3.6 or 3.8 spills registers for, by the compute capability: not offered there. With the length of a step
# that values of their size take; of the forward kernel, which computes the input gradient, too, and of the weight's.
SPILLED: Mapping[int, tuple[Tile, ...]] = {
    80: (Tile(32, 64, 16, 4, 3, sorted=True),),
    86: (Tile(64, 128, 16, 4, 4, sorted=True),),
    89: (Tile(64, 128, 16, 4, 4, sorted=True),),
    100: (Tile(128, 128, 64, 4, 3, sorted=True),),
}
WGRAD_SPILLED: Mapping[int, tuple[Tile, ...]] = {
    80: (Tile(64, 64, 64, 4, 3),),
    120: (Tile(64, 16, 64, 4, 4, sorted=True),),
}


@lru_cache
def capability(device: torch.device) -> int:
    """Return ten times the compute capability of a device, such as 90; 0 if it is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take on a device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else LARGE


def memory_of(tile: Tile, itemsize: int, shared: int) -> int:
    """Return the bytes of shared memory of a tile's operands; steps are those of ``itemsize`` bytes per value.

    Where warps multiply from shared memory a stage is kept until its products are done, elsewhere it is in registers.
    """
    stages = tile.stages if shared >= LARGE else max(1, tile.stages - 1)
    return stages * (tile.m + tile.taps * tile.n) * tile.k * itemsize


def programs_of(tile: Tile, itemsize: int, shared: int) -> int:
    """Return how many programs share a multiprocessor: 1 KB each is reserved, 8 warps have 255 registers a thread."""
    return max(1, min(8 // tile.warps, (shared + 1024) // (memory_of(tile, itemsize, shared) + 1024)))


def _power(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


def _fitting(tiles: tuple[Tile, ...], n: int, k: int, itemsize: int, tensor_cores: bool, shared: int) -> list[Tile]:
    """Return the tiles no wider than ``n`` channels need, with steps no longer than ``k``.

    As many programs as registers allow must share the memory of a multiprocessor.
    """
    longest = [t.k * 2 // itemsize if tensor_cores else t.k for t in tiles]
    kept = [replace(t, k=min(step, _power(k))) for t, step in zip(tiles, longest, strict=True) if t.n <= _power(n)]
    return list(dict.fromkeys(t for t in kept if programs_of(t, itemsize, shared) == 8 // t.warps))


def _in_order(
    tiles: list[Tile], first: tuple[int, int], share: float, most: int, spilled: tuple[Tile, ...]
) -> tuple[Tile, ...]:
    """Return the tiles of ``first`` (m, n) first, sorted ones among them, or before, by the share of active pairs."""
    tiles = sorted(tiles, key=lambda t: (t.m, t.n) != first)
    taken = [t for t in (replace(t, sorted=True) for t in tiles) if t not in spilled]
    tiles = [t for t in tiles if t not in spilled]
    if share < 0.75:  # sorting saves a quarter of the products or more
        return tuple(taken + tiles[:1])
    return tuple(tiles + taken[:most]) if share < 0.9 else tuple(tiles)


@lru_cache(maxsize=4096)
def conv_tiles(
    rows: int,
    c_in: int,
    c_out: int,
    itemsize: int,
    tensor_cores: bool,
    share: float,
    shared: int = LARGE,
    card: int = 0,
) -> tuple[Tile, ...]:
    """Return the configurations of the forward kernel and of the input gradient, the default first.

    Args:
        rows: of the result.
        c_in: channels summed over, per group.
        c_out: channels of the result, per group.
        itemsize: bytes per value.
        tensor_cores: whether products run on them (16 bit, or TF32).
        share: expected share of active (row, tap) pairs.
        shared: bytes of shared memory that a program may take.
        card: its capability as :func:`capability` gives it.
    """
    spilled = SPILLED.get(card, ())
    if not tensor_cores:
        tiles = _fitting(FULL, c_out, c_in, itemsize, False, shared)
        return _in_order(tiles, (tiles[0].m, tiles[0].n), share, 2, spilled)
    tiles = _fitting(CONV if shared >= LARGE else CONV_SMALL, c_out, c_in, itemsize, True, shared)
    if itemsize > 2 or c_in <= 32:  # TF32 and short steps need more registers a product
        tiles = [t for t in tiles if t.m * t.n <= 128 * 64]
    narrow, wide = min(_power(c_out), 64), min(_power(c_out), 128)
    useful = [t for t in tiles if t.n == wide] + [t for t in tiles if t.n == narrow]
    filling = [t for t in useful if rows * c_out >= 128 * t.m * t.n]  # one tile or more for 128 multiprocessors each
    first = filling[0] if filling else min(useful, key=lambda t: t.m * t.n)
    return _in_order(tiles, (first.m, first.n), share, 2, spilled)


@lru_cache(maxsize=4096)
def wgrad_tiles(
    c_in: int,
    c_out: int,
    taps: int,
    itemsize: int,
    tensor_cores: bool,
    share: float,
    shared: int = LARGE,
    card: int = 0,
) -> tuple[Tile, ...]:
    """Return the configurations of the weight gradient, the default first; channels are per group."""
    spilled = WGRAD_SPILLED.get(card, ())
    if not tensor_cores:
        tiles = _fitting(FULL, c_in, 1 << 30, itemsize, False, shared)
        return _in_order(tiles, (tiles[0].m, tiles[0].n), share, 2, spilled)
    tiles = _fitting(WGRAD if shared >= LARGE else WGRAD_SMALL, c_in, 1 << 30, itemsize, True, shared)
    tiles = [t for t in tiles if taps % t.taps == 0 and t.m <= max(64, _power(c_out))]
    if itemsize > 2:
        tiles = [t for t in tiles if t.m * t.n <= 64 * 64]
    wide = (128 if _power(c_out) >= 128 else 64, min(_power(c_in), 128))
    return _in_order(tiles, wide, share, 2, spilled)


def splits_of(tiles: int, slots: int, largest: int) -> int:
    """Return into how many parts the weight gradient splits its rows, at most ``largest``.

    ``tiles`` programs for each part take turns on ``slots``. Of the numbers that fill one to four turns without
    beginning another, the lowest is taken that leaves fewest places empty, in tenths.
    """
    wanted = {max(1, min(slots * turns // tiles, largest)) for turns in (1, 2, 3, 4)}

    def empty(splits: int) -> int:
        turns = -(-tiles * splits // slots)
        return round(10 * (1 - tiles * splits / (turns * slots)))

    return min(wanted, key=lambda splits: (empty(splits), splits))


@lru_cache
def stencil_tile(channels: int) -> Tile:
    """Return the tile of the memory-bound kernels: 64 to 128 bytes of neighbouring channels per row."""
    n = min(_power(channels), 64)
    return Tile(2048 // n, n, 1, 4, 1)
