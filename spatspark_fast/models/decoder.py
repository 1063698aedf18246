"""Reconstruct frames from densified features.

`UNetDecoder` is the published one and costs several times a ResNet-18 encoder; `LightDecoder` predicts whole
patches from the deepest level, so that the encoder is nearly the whole cost of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from spatspark_fast.errors import UserError
from spatspark_fast.models.geometry import strides_of

__all__ = ["LightDecoder", "UNetBlock", "UNetDecoder"]


class UNetBlock(nn.Module):
    """Double the resolution of ``(B, channels, H, W)`` and map it to ``out_channels``."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act = nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_channels, 2H, 2W)``."""
        x = self.up(x)
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class UNetDecoder(nn.Module):
    """Decode ``levels`` densified maps by blocks of doubling resolution and halving width, as in SparK.

    One block for every factor 2 of the deepest stride: five for stride 32. The maps at strides 32, 16, 8, 4
    are added at the inputs of the first four. Width ``width`` at the deepest level must be divisible by 2 for
    each block.
    """

    def __init__(self, out_chans: int, width: int = 768, levels: int = 4) -> None:
        super().__init__()
        num_blocks = strides_of(levels)[-1].bit_length() - 1
        if width < 1 or width % 2**num_blocks:
            raise UserError(f"decoder_width={width} halves {num_blocks} times: choose a multiple of {2**num_blocks}")
        widths = [width // 2**block for block in range(num_blocks + 1)]
        # Widths of the densified maps that this decoder reads, shallow to deep.
        self.in_widths = tuple(reversed(widths[:levels]))
        self.blocks = nn.ModuleList(UNetBlock(*pair) for pair in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], out_chans, kernel_size=1)
        self.apply(_init_weights)

    def forward(self, densified: Sequence[Tensor]) -> Tensor:
        """Map densified maps, shallow to deep, to ``(B, out_chans, H, W)`` at full resolution."""
        *skips, x = densified
        for level, block in enumerate(self.blocks):
            if level > 0 and skips:
                x = x + skips.pop()
            x = block(x)
        return self.head(x)


class LightDecoder(nn.Module):
    """Predict whole patches from the deepest level, as in ConvNeXt V2's FCMAE.

    One ConvNeXt V2 block at the deepest stride ``s``, then a 1x1 convolution to the ``s*s*out_chans`` pixels
    under each position. Only the deepest level is densified.
    """

    def __init__(self, out_chans: int, width: int = 512, levels: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"decoder_width must be at least 1, got {width}")
        self.in_widths = (width,)
        self.stride = strides_of(levels)[-1]
        self.block = ConvNeXtBlock(width, use_grn=True, ls_init_value=None)
        self.head = nn.Conv2d(width, self.stride**2 * out_chans, kernel_size=1)
        self.apply(_init_weights)

    def forward(self, densified: Sequence[Tensor]) -> Tensor:
        """Map the deepest densified map ``(B, width, h, w)`` to ``(B, out_chans, h*s, w*s)``."""
        pixels = self.head(self.block(densified[-1]))
        return F.pixel_shuffle(pixels, self.stride)


def _init_weights(module: nn.Module) -> None:
    """Initialise as SparK does its decoder; norms keep PyTorch's 1 and 0."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
