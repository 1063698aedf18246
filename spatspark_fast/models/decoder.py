"""Reconstruct frames from densified features.

`UNetDecoder` is the published one and costs several times a ResNet-18 encoder; `LightDecoder` predicts whole
patches from the deepest level, so that the encoder is nearly the whole cost of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from math import gcd
from typing import NamedTuple, cast

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from patchsparse import (
    PatchGrid,
    bind,
    image_conv2d,
    image_conv_transpose2d,
    image_grid,
    pack,
    patch_batch_norm_act,
    sparsify,
)
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import check_choice
from spatspark_fast.models.choices import DecoderKind, DecoderNorm
from spatspark_fast.models.geometry import strides_of
from spatspark_fast.models.region import Extent, LevelExtents, Region, crop
from spatspark_fast.models.upsample import pays, upsample_conv

__all__ = ["LightDecoder", "UNetBlock", "UNetDecoder", "build_decoder"]


GROUPS = 32  # channels of a GroupNorm at most, as in its paper (arXiv 1803.08494)
TWO_CONVS = 2  # pixels around its result that the two 3x3 convolutions of a block read


class BlockCrops(NamedTuple):
    """Say which extents a `UNetBlock` is given, keeps between its convolutions, and returns."""

    given: Extent
    between: Extent
    result: Extent


class UNetBlock(nn.Module):
    """Double the resolution of ``(B, channels, H, W)`` and map it to ``out_channels``.

    Its norms are those of the batch as published, or do not depend on it: of groups of channels of each image, or of
    all channels of each pixel ("layer").
    """

    def __init__(self, channels: int, out_channels: int, norm: DecoderNorm = "batch") -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = _norm(norm, channels)
        self.act = nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = _norm(norm, out_channels)

    def forward(self, x: Tensor, backend: str = "dense", crops: BlockCrops | None = None) -> Tensor:
        """Return ``(B, out_channels, 2H, 2W)``, cropped by ``crops``; ``backend`` as in `patchsparse.image_conv2d`."""
        if pays(x, self.up):
            x = upsample_conv(x, self.up, self.conv1, backend)
        else:
            x = image_conv_transpose2d(x, self.up.weight, self.up.bias, backend)
            x = image_conv2d(x, self.conv1.weight, None, backend)
        if crops is not None:
            x = crop(x, crops.given.doubled(), crops.between)
        x = image_conv2d(self._norm_act(x, backend), self.conv2.weight, None, backend)
        return self.norm2(x if crops is None else crop(x, crops.between, crops.result))

    def _norm_act(self, x: Tensor, backend: str) -> Tensor:
        """Normalise and activate; on a GPU in one pass over memory, unless the backend is ``"dense"``."""
        norm = self.norm1
        if backend == "dense" or not x.is_cuda or type(norm) is not nn.BatchNorm2d or norm.momentum is None:
            return self.act(norm(x))
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        statistics = (
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.training,
            norm.momentum,
            norm.eps,
        )
        slope = self.act.negative_slope
        return patch_batch_norm_act(x, *statistics, activation="leaky_relu", slope=slope, backend=backend)


class UNetDecoder(nn.Module):
    """Decode ``levels`` densified maps by blocks of doubling resolution and halving width, as in SparK.

    One block for every factor 2 of the deepest stride: five for stride 32. The maps at strides 32, 16, 8, 4
    are added at the inputs of the first four. Width ``width`` at the deepest level must be divisible by 2 for
    each block.

    Of a `Region`, every block computes only what the later ones read. All of it has the values that it has in the whole
    image, but for the batch statistics of the norms, which are those of what is computed.
    """

    def __init__(self, out_chans: int, width: int = 768, levels: int = 4, norm: DecoderNorm = "batch") -> None:
        super().__init__()
        self.stride = strides_of(levels)[-1]
        num_blocks = self.stride.bit_length() - 1
        if width < 1 or width % 2**num_blocks:
            raise UserError(f"decoder_width={width} halves {num_blocks} times: choose a multiple of {2**num_blocks}")
        widths = [width // 2**block for block in range(num_blocks + 1)]
        # Widths of the densified maps that this decoder reads, shallow to deep.
        self.in_widths = tuple(reversed(widths[:levels]))
        self.blocks = nn.ModuleList(UNetBlock(*pair, norm) for pair in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], out_chans, kernel_size=1)
        self.apply(_init_weights)

    def levels_of(self, region: Region) -> list[LevelExtents]:
        """Return what is read of each densified map, shallow to deep as they are, to reconstruct a ``region``."""
        return [region.level(*read) for read in reversed(self._reads()[: len(self.in_widths)])]

    def _reads(self) -> list[tuple[int, int]]:
        """Return the stride of each block's input, and how many pixels around a region it reads there.

        Counted from the last block backwards: it alone has nothing to write but the region.
        """
        found: list[tuple[int, int]] = []
        stride, around = 1, 0
        while stride < self.stride:
            # Pixel q of a 4x4 transposed convolution of stride 2 and padding 1 reads (q - 2) / 2 to (q + 1) / 2.
            stride, around = 2 * stride, (around + TWO_CONVS + 2) // 2
            found.insert(0, (stride, around))
        return found

    def _crops(self, region: Region) -> list[BlockCrops]:
        """Return what each block crops."""
        reads = [*self._reads(), (1, 0)]
        return [
            BlockCrops(region.extent(*given), region.extent(stride, around + 1), region.extent(stride, around))
            for given, (stride, around) in pairwise(reads)
        ]

    def forward(self, densified: Sequence[Tensor], decoded: Region | None = None, backend: str = "dense") -> Tensor:
        """Map densified maps, shallow to deep, to ``(B, out_chans, H, W)`` at full resolution.

        With ``backend="dense"`` whole images are convolved by PyTorch's own layers alone.

        With ``decoded``, the maps are what `levels_of` says of this region, and the result is its pixels.
        """
        *skips, x = densified
        blocks = cast(Sequence[UNetBlock], self.blocks)
        crops = [None] * len(blocks) if decoded is None else self._crops(decoded)
        for index, block in enumerate(blocks):
            if index > 0 and skips:
                x = x + skips.pop()
            x = block(x, backend, crops[index])
        return self.head(x)


class LightDecoder(nn.Module):
    """Predict whole patches from the deepest level, as in ConvNeXt V2's FCMAE.

    One ConvNeXt V2 block at the deepest stride ``s``, then a 1x1 convolution to the ``s*s*out_chans`` pixels
    under each position. Only the deepest level is densified.

    With a grid of ``decoded`` patches, the last convolution draws these alone; their values are the same.
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
        sparsify(self)

    def forward(self, densified: Sequence[Tensor], decoded: PatchGrid | None = None, backend: str = "dense") -> Tensor:
        """Map the deepest densified map ``(B, width, h, w)`` to ``(B, out_chans, h*s, w*s)``.

        With ``decoded`` the result is packed on it, ``(N, out_chans, patch, patch)``. ``backend`` as in `UNetDecoder`.
        """
        x = densified[-1]
        grid = image_grid(x, backend)
        with nullcontext() if grid is None else bind(self, grid):
            x = self.block(x)
            pixels = self.head(x if decoded is None else pack(x, decoded))
        return F.pixel_shuffle(pixels, self.stride)


def build_decoder(
    kind: DecoderKind, out_chans: int, width: int, levels: int = 4, norm: DecoderNorm = "batch"
) -> UNetDecoder | LightDecoder:
    """Build a decoder that draws ``out_chans`` frames; ``norm`` is that of a U-Net's blocks. Raises UserError."""
    check_choice("decoder", kind, DecoderKind)
    return LightDecoder(out_chans, width, levels) if kind == "light" else UNetDecoder(out_chans, width, levels, norm)


def _norm(kind: DecoderNorm, channels: int) -> nn.Module:
    norms = {
        "batch": lambda: nn.BatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(gcd(GROUPS, channels), channels),
        "layer": lambda: LayerNorm2d(channels),
    }
    check_choice("decoder_norm", kind, DecoderNorm)
    return norms[kind]()


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
