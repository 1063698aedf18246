"""Bring packed features back to whole images: norm, mask token, projection to the decoder's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from patchsparse import PatchGrid, image_conv2d, patch_batch_norm_unpack, unpack
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.region import LevelExtents, crop

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

    def forward(
        self,
        features: Tensor,
        grid: PatchGrid | None = None,
        region: LevelExtents | None = None,
        backend: str = "dense",
    ) -> Tensor:
        """Map packed ``(N, C, p, p)``, or dense ``(B, C, H, W)`` if no ``grid``, to ``(B, width, H, W)``.

        With ``region`` only its extent is mapped, to the values that it has in the whole image. ``backend`` as in
        `patchsparse.image_conv2d`.
        """
        image = self._filled(features, grid, backend)
        if region is None:
            return self.project(image, backend)
        if isinstance(self.proj, nn.Identity) or self.proj.kernel_size[0] == 1:
            return self.project(crop(image, region.whole, region.wanted), backend)
        return crop(self.project(crop(image, region.whole, region.rim), backend), region.rim, region.wanted)

    def project(self, image: Tensor, backend: str = "dense") -> Tensor:
        """Map whole images of normed features and tokens ``(B, C, H, W)`` to ``(B, width, H, W)``."""
        if isinstance(self.proj, nn.Identity):
            return image
        return image_conv2d(image, self.proj.weight, self.proj.bias, backend)

    def _filled(self, features: Tensor, grid: PatchGrid | None, backend: str) -> Tensor:
        """Return the norm of the features as whole images, tokens at masked patches."""
        norm = self.norm
        if (
            grid is not None
            and isinstance(norm, nn.BatchNorm2d)
            and norm.momentum is not None
            and backend != "dense"
            and self._fuses(features)
        ):
            return self._densified(features, grid, norm, norm.momentum, backend)
        features = norm(features)
        return features if grid is None else unpack(features, grid, fill=self.mask_token)

    def _fuses(self, features: Tensor) -> bool:
        """Return whether one operator for norm and token is faster: on a GPU, where both are bound by memory."""
        return features.is_cuda

    def _densified(
        self, features: Tensor, grid: PatchGrid, norm: nn.BatchNorm2d, momentum: float, backend: str
    ) -> Tensor:
        """Return ``unpack(norm(features), grid, mask_token)``, and count the batch as the module does."""
        return patch_batch_norm_unpack(
            features,
            grid,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            self.mask_token,
            norm.training,
            momentum,
            norm.eps,
            backend,
            batches=norm.num_batches_tracked,
        )


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

    def forward(
        self,
        features: Sequence[Tensor],
        grid: PatchGrid | None = None,
        regions: Sequence[LevelExtents] | None = None,
        backend: str = "dense",
    ) -> list[Tensor]:
        """Map features, shallow to deep, to dense maps ``(B, width, H, W)`` of the levels that are wanted.

        With ``regions``, one for each of these levels, to these extents of them.
        """
        wanted = features[-len(self.levels) :]
        at = [None] * len(wanted) if regions is None else regions
        return [
            level(feature, grid, region, backend)
            for level, feature, region in zip(self.levels, wanted, at, strict=True)
        ]
