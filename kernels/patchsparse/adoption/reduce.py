"""Reductions over the active pixels of each image, and their way back to the packed rows.

Both directions go through ``unpack`` and ``pack`` of one number per patch, which gather forward and backward. So the
result is the same bits in every run, an image never sees another one's NaN, and an image without any active patch
gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import PatchGrid
from ..packing import pack, unpack

__all__ = ["group_norm", "image_mean", "image_norm", "image_sum", "spread"]


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is narrower."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _pixels(grid: PatchGrid, x: Tensor) -> Tensor:
    """Return ``(B, 1, 1, 1)``, the number of active pixels of each image, at least 1."""
    count = (grid.counts() * (x.shape[2] * x.shape[3])).clamp(min=1)
    return count.to(x.dtype).view(-1, 1, 1, 1)


def image_sum(per_patch: Tensor, grid: PatchGrid) -> Tensor:
    """Add the patches of each image: ``(N, C, 1, 1)`` to ``(B, C, 1, 1)``."""
    return unpack(per_patch, grid).sum(dim=(2, 3), keepdim=True)


def spread(per_image: Tensor, grid: PatchGrid) -> Tensor:
    """Give every patch the value of its image: ``(B, C, 1, 1)`` to ``(N, C, 1, 1)``."""
    return pack(per_image.expand(-1, -1, *grid.shape), grid)


def image_mean(x: Tensor, grid: PatchGrid) -> Tensor:
    """Average ``(N, C, p, p)`` over the active pixels of each image: ``(B, C, 1, 1)``, summed in float32."""
    wide = _wide(x)
    total = image_sum(wide.sum(dim=(2, 3), keepdim=True), grid)
    return (total / _pixels(grid, wide)).to(x.dtype)


def image_norm(x: Tensor, grid: PatchGrid) -> Tensor:
    """Return the Euclidean norm of ``(N, C, p, p)`` over the active pixels of each image, ``(B, C, 1, 1)``.

    A norm of norms, and not the root of a sum: its gradient is 0, not NaN, where all pixels are 0.
    """
    per_patch = torch.linalg.vector_norm(_wide(x), dim=(2, 3), keepdim=True)
    return torch.linalg.vector_norm(unpack(per_patch, grid), dim=(2, 3), keepdim=True)


def group_norm(
    x: Tensor, grid: PatchGrid, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise each channel group of ``(N, C, p, p)`` by mean and variance over the active pixels of an image.

    Mean and variance of each patch are combined (Chan, Golub and LeVeque 1979), so that no precision is lost.
    """
    n, channels, height, width = x.shape
    grouped = _wide(x).reshape(n, groups, channels // groups, height * width)
    variance, mean = torch.var_mean(grouped, dim=(2, 3), correction=0, keepdim=True)
    patches = grid.counts().clamp(min=1).to(mean.dtype).view(-1, 1, 1, 1)
    image_average = spread(image_sum(mean, grid) / patches, grid)
    second = variance + (mean - image_average).square()
    image_variance = image_sum(second, grid) / patches
    scale = spread((image_variance + eps).rsqrt(), grid)
    y = ((grouped - image_average) * scale).reshape(n, channels, height, width)
    if weight is not None:
        y = y * weight.to(y.dtype).view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.to(y.dtype).view(1, -1, 1, 1)
    return y.to(x.dtype)
