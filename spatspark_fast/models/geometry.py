"""Relate image size, patch size and the strides of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from spatspark_fast.common.errors import UserError

__all__ = ["check_patch", "grid_shape", "strides_of"]


def strides_of(levels: int) -> tuple[int, ...]:
    """Return the strides of the first ``levels`` feature maps: 4, 8, 16, 32.

    Raises UserError unless ``levels`` is 1, 2, 3 or 4.
    """
    if levels not in (1, 2, 3, 4):
        raise UserError(f"levels must be 1, 2, 3 or 4 (feature maps at strides 4, 8, 16, 32), got {levels}")
    return tuple(4 * 2**level for level in range(levels))


def check_patch(patch: int, levels: int) -> None:
    """Raise UserError unless a ``patch`` (pixels) holds whole pixels of the deepest feature map."""
    stride = strides_of(levels)[-1]
    if patch >= stride and patch % stride == 0:
        return
    fitting = [fewer for fewer in range(levels - 1, 0, -1) if patch > 0 and patch % strides_of(fewer)[-1] == 0]
    remedy = f"a multiple of {stride}"
    if fitting:
        remedy += f", or levels={fitting[0]} (deepest stride {strides_of(fitting[0])[-1]})"
    raise UserError(f"patch={patch} does not fit levels={levels} with deepest stride {stride}: choose {remedy}")


def grid_shape(size: Sequence[int], patch: int) -> tuple[int, int]:
    """Return the grid ``(Gh, Gw)`` of an image of ``size`` (H, W) pixels in patches of ``patch`` pixels.

    Raises UserError naming the size, the patch and the nearest sizes that fit.
    """
    height, width = size
    if min(height, width) >= patch and height % patch == 0 and width % patch == 0:
        return height // patch, width // patch
    lower = " x ".join(str(max(side // patch, 1) * patch) for side in (height, width))
    upper = " x ".join(str(-(-side // patch) * patch) for side in (height, width))
    nearest = upper if lower == upper else f"{lower} or {upper}"
    raise UserError(
        f"an image of {height} x {width} pixels cannot be cut into patches of {patch}: crop or pad it to {nearest}"
    )
