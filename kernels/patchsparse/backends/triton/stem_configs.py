"""The configurations of convolutions with few input channels; the first that fits is the default.

All fit into the 99 KB of shared memory that the smallest devices give a program. Values of 4 bytes take steps of half
the length.
"""

from __future__ import annotations

from dataclasses import replace

from ...eager import once
from .configs import FULL, Tile

__all__ = ["STEM", "STEM_WGRAD", "stem_tiles", "stem_wgrad_tiles"]

# Without stages, values come through the L1 cache, which the asynchronous copies of the others pass by: footprints of
# neighbours overlap.
STEM = (
    Tile(128, 64, 64, 4, 3),
    Tile(256, 64, 64, 8, 2),
    Tile(128, 64, 64, 4, 1),
    Tile(128, 32, 64, 4, 3),
    Tile(128, 16, 64, 4, 3),
)
STEM_WGRAD = (Tile(64, 128, 64, 4, 3), Tile(64, 256, 64, 8, 2), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 2))


@once
def stem_tiles(c_out: int, total: int, itemsize: int, tensor_cores: bool) -> list[Tile]:
    """Return the configurations of the forward kernel, the default first.

    Args:
        c_out: output channels.
        total: values that an output reads.
        itemsize: bytes per value.
        tensor_cores: whether products run on them (16 bit, or TF32).
    """
    tiles = [t for t in _halved(STEM, itemsize, tensor_cores) if t.n <= _power(c_out)]
    return list(dict.fromkeys(replace(t, k=min(t.k, _power(total))) for t in tiles))


@once
def stem_wgrad_tiles(total: int, itemsize: int, tensor_cores: bool) -> list[Tile]:
    """Return the configurations of the weight gradient, the default first."""
    return [t for t in _halved(STEM_WGRAD, itemsize, tensor_cores) if t.n <= max(_power(total), 32)]


def _halved(tiles: tuple[Tile, ...], itemsize: int, tensor_cores: bool) -> list[Tile]:
    return [replace(t, k=t.k * 2 // itemsize) for t in tiles] if tensor_cores else list(FULL)


def _power(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())
