"""Per-image and spatial modules of timm on packed patches. Imported only when a model holds such a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.blur_pool import BlurPool2d
from timm.layers.drop import DropPath
from timm.layers.eca import CecaModule, EcaModule
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import GroupNorm, GroupNorm1
from timm.layers.norm_act import GroupNorm1Act, GroupNormAct
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor

from ..functional import patch_conv2d
from .modules import PatchConv2d, PatchImageModule, PatchModule
from .reduce import group_norm, image_mean, image_norm, spread

__all__ = [
    "PatchBlurPool2d",
    "PatchCeca",
    "PatchDropPath",
    "PatchEca",
    "PatchEffectiveSqueezeExcite",
    "PatchEfficientNetSqueezeExcite",
    "PatchFastAdaptiveAvgPool",
    "PatchGlobalResponseNorm",
    "PatchGroupNorm1Act",
    "PatchGroupNorm1Timm",
    "PatchGroupNormAct",
    "PatchGroupNormTimm",
    "PatchScaledStdConv2d",
    "PatchSqueezeExcite",
    "PatchStdConv2d",
]


class PatchDropPath(PatchImageModule, DropPath):
    """Drop the residual branch of whole images, as the dense module does with the same random state."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        if self.drop_prob == 0.0 or not self.training:
            return x
        share = 1.0 - self.drop_prob
        kept = x.new_empty((grid.batch_size, 1, 1, 1)).bernoulli_(share)
        if share > 0.0 and self.scale_by_keep:
            kept.div_(share)
        return x * kept.index_select(0, grid.image)


class PatchSqueezeExcite(PatchImageModule, SEModule):
    """Gate channels by the mean over the active pixels of each image."""

    act: Any
    gate: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        gate = self.fc2(self.act(self.bn(self.fc1(image_mean(x, grid)))))
        return x * spread(self.gate(gate), grid)


class PatchEffectiveSqueezeExcite(PatchImageModule, EffectiveSEModule):
    """Gate channels by the mean over the active pixels of each image, one layer."""

    gate: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        return x * spread(self.gate(self.fc(image_mean(x, grid))), grid)


class PatchEfficientNetSqueezeExcite(PatchImageModule, SqueezeExcite):
    """Gate channels by the mean over the active pixels of each image (EfficientNet, MobileNet, GhostNet)."""

    act1: Any
    gate: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        gate = self.conv_expand(self.act1(self.conv_reduce(image_mean(x, grid))))
        return x * spread(self.gate(gate), grid)


class PatchEca(PatchImageModule, EcaModule):
    """Gate channels by a 1-D convolution over the channel means of each image's active pixels."""

    gate: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        y: Any = self.conv(image_mean(x, grid).flatten(1).unsqueeze(1))
        if self.act is not None and self.conv2 is not None:
            y = self.conv2(self.act(y))
        return x * spread(self.gate(y).view(grid.batch_size, -1, 1, 1), grid)


class PatchCeca(PatchImageModule, CecaModule):
    """Gate channels by a circular 1-D convolution over the channel means of each image's active pixels."""

    gate: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        y = image_mean(x, grid).flatten(1).unsqueeze(1)
        y = self.conv(F.pad(y, (self.padding, self.padding), mode="circular"))
        return x * spread(self.gate(y).view(grid.batch_size, -1, 1, 1), grid)


class PatchGlobalResponseNorm(PatchImageModule, GlobalResponseNorm):
    """Compare channels by their norm over the active pixels of each image; channels first or last."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` or ``(N, p, p, C)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        last = self.channel_dim == -1
        norm = image_norm(x.permute(0, 3, 1, 2) if last else x, grid)
        relative = spread(norm / (norm.mean(dim=1, keepdim=True) + self.eps), grid).to(x.dtype)
        if last:
            relative = relative.permute(0, 2, 3, 1)
        weight, bias = self.weight.view(self.wb_shape), self.bias.view(self.wb_shape)
        return x + torch.addcmul(bias, weight, x * relative)


class PatchFastAdaptiveAvgPool(PatchImageModule, FastAdaptiveAvgPool):
    """Average each image over its active pixels."""

    pools = True

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(B, C)`` or ``(B, C, 1, 1)``; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        mean = image_mean(x, grid)
        return mean.flatten(1) if self.flatten else mean


class PatchGroupNormTimm(PatchImageModule, GroupNorm):
    """Normalise groups of channels over the active pixels of each image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        return group_norm(x, grid, self.num_groups, self.weight, self.bias, self.eps)


class PatchGroupNorm1Timm(PatchImageModule, GroupNorm1):
    """Normalise all channels over the active pixels of each image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        return group_norm(x, grid, self.num_groups, self.weight, self.bias, self.eps)


class PatchGroupNormAct(PatchImageModule, GroupNormAct):
    """Normalise groups of channels over the active pixels of each image, then drop and activate."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        y = group_norm(x, grid, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(y))


class PatchGroupNorm1Act(PatchImageModule, GroupNorm1Act):
    """Normalise all channels over the active pixels of each image, then drop and activate."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        y = group_norm(x, grid, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(y))


class PatchStdConv2d(PatchConv2d, StdConv2d):
    """Convolve packed patches with a standardised weight (BiT ResNetV2)."""

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return StdConv2d.forward(self, input)
        return self._packed_conv(input, _standardised(self, None), grid)


class PatchScaledStdConv2d(PatchConv2d, ScaledStdConv2d):
    """Convolve packed patches with a scaled standardised weight (NFNet)."""

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return ScaledStdConv2d.forward(self, input)
        return self._packed_conv(input, _standardised(self, (self.gain * self.scale).view(-1)), grid)


def _standardised(conv: Any, gain: Tensor | None) -> Tensor:
    flat = conv.weight.reshape(1, conv.out_channels, -1)
    normal = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
    return normal.reshape_as(conv.weight)


class PatchBlurPool2d(PatchModule, BlurPool2d):
    """Blur and subsample packed patches; only with ``pad_mode="constant"``, which is zero padding."""

    filt: Any
    padding: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C, p/s, p/s)``; run densely where no grid is bound."""
        grid = self._grid(x)
        if grid is None:
            return super().forward(x)
        channels, size = x.shape[1], self.filt_size
        weight = self.filt.expand(channels, 1, size, size).to(x.dtype)
        backend = self.patch_binding.backend
        return patch_conv2d(x, weight, None, grid, self.stride, self.padding[0], 1, channels, backend)
