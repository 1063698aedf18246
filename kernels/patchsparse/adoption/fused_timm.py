"""Blocks of timm that call a batch norm, add a shortcut and activate. Imported only when a model holds such a block.

Each ``forward`` is timm's own, with :func:`norm_act` in place of norm, addition and activation.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm_act import BatchNormAct2d
from timm.models import regnet, resnet
from timm.models._features import FeatureDictNet, FeatureListNet
from timm.models.dla import DlaBasic, DlaBottleneck
from torch import Tensor, nn

from .fused import NOTHING, PatchContainer, PatchNorm, fuses, in_pairs, is_watched, norm_act, why_not_one

__all__ = [
    "PatchBasicBlock",
    "PatchBatchNormAct2d",
    "PatchBottleneck",
    "PatchDlaBasic",
    "PatchDlaBottleneck",
    "PatchFeatureDictNet",
    "PatchFeatureListNet",
    "PatchRegNetBottleneck",
]


class PatchBatchNormAct2d(PatchNorm, BatchNormAct2d):
    """Normalise over the active pixels, drop and activate."""

    act: Any
    drop: Any

    def inner(self) -> tuple[nn.Module, ...]:
        """Return the modules that the norm itself calls after normalising."""
        return self.drop, self.act

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape."""
        if fuses(self.patch_binding, x) and why_not_one((self.drop,), self.act) is None:
            return self.with_activation(x, self.act)
        if self.joins():
            return self.act(self.drop(self.with_activation(x, NOTHING)))
        return super().forward(x)


class PatchBasicBlock(PatchContainer, resnet.BasicBlock):
    """ResNet's block of two 3x3 convolutions."""

    aa: Any
    se: Any
    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``."""
        if not self.fuses(x):
            return super().forward(x)
        y = self.aa(norm_act(self.conv1(x), self.bn1, self.act1, (self.drop_block,)))
        y = self.conv2(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return norm_act(y, self.bn2, self.act2, (self.se, self.drop_path), shortcut)


class PatchBottleneck(PatchContainer, resnet.Bottleneck):
    """ResNet's block of a 1x1, a 3x3 and a 1x1 convolution; also ResNeXt's, and with squeeze-and-excite."""

    aa: Any
    se: Any
    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``."""
        if not self.fuses(x):
            return super().forward(x)
        y = norm_act(self.conv1(x), self.bn1, self.act1)
        y = self.aa(norm_act(self.conv2(y), self.bn2, self.act2, (self.drop_block,)))
        y = self.conv3(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return norm_act(y, self.bn3, self.act3, (self.se, self.drop_path), shortcut)


class PatchRegNetBottleneck(PatchContainer, regnet.Bottleneck):
    """RegNet's block; its last norm is in a module of its own with the last convolution."""

    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``."""
        last: Any = self.conv3
        apart = type(last) is not ConvNormAct or last.aa is not None or is_watched(last)
        if not self.fuses(x) or apart or self.downsample is None:
            return super().forward(x)
        y = last.conv(self.se(self.conv2(self.conv1(x))))
        return norm_act(y, last.bn, self.act3, (self.drop_path,), self.downsample(x))


class PatchDlaBasic(PatchContainer, DlaBasic):
    """DLA's block of two 3x3 convolutions."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``; ``shortcut`` has the shape of the result."""
        if not self.fuses(x):
            return super().forward(x, shortcut, children)
        y = self.conv2(norm_act(self.conv1(x), self.bn1, self.relu))
        return norm_act(y, self.bn2, self.relu, (), x if shortcut is None else shortcut)


class PatchDlaBottleneck(PatchContainer, DlaBottleneck):
    """DLA's block of a 1x1, a 3x3 and a 1x1 convolution."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``; ``shortcut`` has the shape of the result."""
        if not self.fuses(x):
            return super().forward(x, shortcut, children)
        y = norm_act(self.conv1(x), self.bn1, self.relu)
        y = self.conv3(norm_act(self.conv2(y), self.bn2, self.relu))
        return norm_act(y, self.bn3, self.relu, (), x if shortcut is None else shortcut)


class _FeatureNet(PatchContainer, FeatureDictNet):
    def _collect(self, x: Any) -> Any:
        if self.grad_checkpointing or not self.fuses(x):
            return super()._collect(x)
        features = OrderedDict()
        for name, module, norm in in_pairs(self.items(), self.return_layers):
            x = module(x) if norm is None else norm_act(x, norm, module)
            if name in self.return_layers:
                several = isinstance(x, (tuple, list))
                feature = (torch.cat(list(x), 1) if self.concat else x[0]) if several else x
                features[self.return_layers[name]] = feature
        return features


class PatchFeatureDictNet(_FeatureNet):
    """What timm's ``features_only`` makes of a model whose parts are called one after the other, as a dictionary."""


class PatchFeatureListNet(_FeatureNet, FeatureListNet):
    """The same as a list."""
