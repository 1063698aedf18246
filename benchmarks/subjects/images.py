"""Random images and masks of the suites that look at one operation other than a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from patchsparse import PatchGrid

from ..measure.scales import MASKED, Scale

__all__ = ["random_grid", "random_image"]


def random_grid(scale: Scale, generator: torch.Generator) -> PatchGrid:
    """Return a mask for the images of a single layer, on the device of the scale."""
    side = (scale.layer_side, scale.layer_side)
    return PatchGrid.random(scale.layer_batch, side, 1 - MASKED, generator=generator).to(scale.device)


def random_image(grid: PatchGrid, channels: int, p: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return normal values ``(B, C, Gh * p, Gw * p)`` in channels_last memory, drawn on the CPU."""
    values = torch.randn(grid.batch_size, channels, *(side * p for side in grid.shape), generator=generator)
    return values.to(grid.device, dtype).contiguous(memory_format=torch.channels_last)
