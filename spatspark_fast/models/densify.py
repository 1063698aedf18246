"""Bring packed features back to whole images: norm, mask token, projection to the decoder's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from patchsparse import PatchGrid, unpack
from spatspark_fast.errors import UserError

__all__ = ["Densify", "DensifyLevel", "NormKind"]

NormKind = Literal["batch", "layer"]


class DensifyLevel(nn.Module):
    """Densify the feature map of one level.

    The norm sees visible positions only, because packed features hold nothing else. Positions of masked
    patches are then filled with a learned token ``(C,)``, and a convolution of ``kernel_size`` 1 or 3 brings
    ``channels`` to ``width``.
    """

    def __init__(self, channels: int, width: int, kernel_size: int, norm: NormKind) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm == "batch" else LayerNorm2d(channels)
        self.mask_token = nn.Parameter(torch.empty(channels))
        # SparK: the deepest level needs no projection when the widths agree already.
        keep = kernel_size == 1 and channels == width
        self.proj = nn.Identity() if keep else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        # SparK cuts the token's normal at one standard deviation.
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, features: Tensor, grid: PatchGrid | None = None) -> Tensor:
        """Map packed ``(N, C, p, p)``, or dense ``(B, C, H, W)`` if no ``grid``, to ``(B, width, H, W)``."""
        features = self.norm(features)
        if grid is not None:
            features = unpack(features, grid, fill=self.mask_token)
        return self.proj(features)


class Densify(nn.Module):
    """Densify the levels that a decoder asks for.

    ``channels`` are those of the encoder's features, ``widths`` those of the decoder, both shallow to deep. A
    decoder that reads the deepest levels only gives fewer widths; the other levels get no parameters.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], norm: NormKind) -> None:
        super().__init__()
        if len(widths) > len(channels):
            raise UserError(f"the decoder asks for {len(widths)} levels, the encoder gives {len(channels)}")
        wanted = list(zip(channels[-len(widths) :], widths, strict=True))
        deepest = len(wanted) - 1
        self.levels = nn.ModuleList(
            DensifyLevel(channel, width, kernel_size=1 if level == deepest else 3, norm=norm)
            for level, (channel, width) in enumerate(wanted)
        )

    def forward(self, features: Sequence[Tensor], grid: PatchGrid | None = None) -> list[Tensor]:
        """Map features, shallow to deep, to dense maps ``(B, width, H, W)`` of the levels that are wanted."""
        wanted = features[-len(self.levels) :]
        return [level(feature, grid) for level, feature in zip(self.levels, wanted, strict=True)]
