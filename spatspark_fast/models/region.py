"""The region of an image that a step of sparse decoding reconstructs: a rectangle of neighbouring patches.

A U-Net reads more pixels than it writes. For a region to be reconstructed as it would be in the whole image, every
block has to get the pixels around it that the next blocks still read: few of them, and fewer from block to block.
An `Extent` is the region at one resolution with so many pixels around it; `crop` goes from one to the next.

At the edge of an image an extent is pushed inside, so that all have one size and padding lies only where the image
ends. What lies further from the region than the next blocks read is computed too, from padding that is not real, and
is cropped before it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Extent", "LevelExtents", "Region", "crop", "draw_region", "region_shape"]

SQUARE = 0.5  # how much a region's shape counts beside its size: a rectangle 1:2 is as bad as one 1.4 times too large


class Extent(NamedTuple):
    """Hold a rectangle of pixels in each image: ``first`` row and column ``(B, 2)`` int64, and ``size`` (h, w)."""

    first: Tensor
    size: tuple[int, int]

    def doubled(self) -> Extent:
        """Return the same rectangle at twice the resolution."""
        return Extent(2 * self.first, (2 * self.size[0], 2 * self.size[1]))


class LevelExtents(NamedTuple):
    """Hold the extents of a densified level: the ``whole`` image, what is ``wanted``, and with a ``rim`` around it.

    The rim of one pixel is what a 3x3 convolution reads.
    """

    whole: Extent
    rim: Extent
    wanted: Extent


@dataclass(frozen=True)
class Region:
    """Hold a rectangle of patches in each of ``B`` images.

    Args:
        first: row and column of its first patch, ``(B, 2)`` int64, on the device of the images
        shape: its rows and columns, in patches
        grid: rows and columns of patches of an image
        patch: side of a patch in pixels
    """

    first: Tensor
    shape: tuple[int, int]
    grid: tuple[int, int]
    patch: int

    def extent(self, stride: int = 1, around: int = 0) -> Extent:
        """Return its pixels at a ``stride``, with so many pixels ``around`` it, pushed inside the image."""
        side = self.patch // stride
        size = [min(own * side + 2 * around, whole * side) for own, whole in zip(self.shape, self.grid, strict=True)]
        first = [(side * self.first[:, axis] - around).clamp(0, side * self.grid[axis] - size[axis]) for axis in (0, 1)]
        return Extent(torch.stack(first, 1), (size[0], size[1]))

    def whole(self, stride: int = 1) -> Extent:
        """Return all pixels of an image at a ``stride``."""
        side = self.patch // stride
        return Extent(torch.zeros_like(self.first), (side * self.grid[0], side * self.grid[1]))

    def level(self, stride: int, around: int) -> LevelExtents:
        """Return the extents of a densified level at a ``stride`` that is wanted with so many pixels ``around``."""
        return LevelExtents(self.whole(stride), self.extent(stride, around + 1), self.extent(stride, around))

    def patches(self, of_image: Tensor) -> Tensor:
        """Return its part of ``(B, Gh, Gw)``, one value for each patch, as ``(B, rows, columns)``."""
        whole, own = Extent(torch.zeros_like(self.first), self.grid), Extent(self.first, self.shape)
        return crop(of_image[:, None], whole, own)[:, 0]


def region_shape(grid: tuple[int, int], share: float) -> tuple[int, int]:
    """Return rows and columns, near square, of the region with about a ``share`` of the patches of a ``grid``."""
    wanted = max(share * grid[0] * grid[1], 1.0)

    def misfit(shape: tuple[int, int]) -> float:
        rows, columns = shape
        return abs(math.log(rows * columns / wanted)) + SQUARE * abs(math.log(rows / columns))

    return min(((r, c) for r in range(1, grid[0] + 1) for c in range(1, grid[1] + 1)), key=misfit)


def draw_region(
    worth: Tensor, place: Tensor, shape: tuple[int, int], patch: int, needed: Tensor | None = None
) -> Region:
    """Draw a region of ``shape`` in each image, in proportion to what its patches are worth together.

    ``worth`` of each patch is ``(B, Gh, Gw)``, above 0; ``place`` ``(B, 1)``, uniform in [0, 1), decides. Every region
    holds a patch that is ``needed``, bool ``(B, Gh, Gw)``, of which each image has one. Nothing is read back from the
    device.
    """
    sums = F.avg_pool2d(worth.float().unsqueeze(1), shape, stride=1)
    if needed is not None:
        sums = sums * F.max_pool2d(needed.float().unsqueeze(1), shape, stride=1)
    up_to = sums.flatten(1).cumsum(1)
    drawn = torch.searchsorted(up_to, (place * up_to[:, -1:]).contiguous(), right=True).clamp(max=up_to.shape[1] - 1)
    columns = sums.shape[3]
    first = torch.cat((drawn // columns, drawn % columns), 1)
    return Region(first, shape, (worth.shape[1], worth.shape[2]), patch)


def crop(images: Tensor, given: Extent, wanted: Extent) -> Tensor:
    """Return the ``wanted`` extent of ``images`` ``(B, C, h, w)``, which hold the ``given`` one, in channels_last.

    Nothing is read back from the device. The given extent must contain the wanted one.
    """
    if given.size == wanted.size:
        return images
    height, width = given.size
    place = wanted.first - given.first
    across = torch.arange(max(wanted.size), device=images.device)
    rows = place[:, :1] + across[: wanted.size[0]] + height * torch.arange(len(place), device=images.device)[:, None]
    columns = place[:, 1:] + across[: wanted.size[1]]
    pixels = width * rows[:, :, None] + columns[:, None, :]
    return _Crop.apply(images, pixels)  # type: ignore[no-any-return]


class _Crop(torch.autograd.Function):
    """Take ``pixels`` ``(B, h, w)``, all different, of images seen as rows of channels; put their gradients back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, pixels: Tensor) -> Tensor:
        ctx.save_for_backward(pixels)
        ctx.size = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
        return rows.index_select(0, pixels.flatten()).view(*pixels.shape, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (pixels,) = ctx.saved_tensors
        batch, channels, height, width = ctx.size
        grad = grads[0].permute(0, 2, 3, 1).reshape(-1, channels)
        rows = grad.new_zeros(batch * height * width, channels).index_copy_(0, pixels.flatten(), grad)
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2), None
