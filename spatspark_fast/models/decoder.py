"""Reconstruct frames from densified features.

`UNetDecoder` is the published one and costs several times a ResNet-18 encoder; `LightDecoder` predicts whole
patches from the deepest level, so that the encoder is nearly the whole cost of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
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
    patch_conv2d,
    patch_conv_transpose2d,
    sparsify,
)
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.geometry import strides_of
from spatspark_fast.models.upsample import pays, upsample_conv

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

    def forward(self, x: Tensor, backend: str = "dense") -> Tensor:
        """Return ``(B, out_channels, 2H, 2W)``; ``backend`` as in `patchsparse.image_conv2d`."""
        if pays(x, self.up):
            x = upsample_conv(x, self.up, self.conv1, backend)
        else:
            x = image_conv_transpose2d(x, self.up.weight, self.up.bias, backend)
            x = image_conv2d(x, self.conv1.weight, None, backend)
        return self.norm2(image_conv2d(self._norm_act(x, backend), self.conv2.weight, None, backend))

    def forward_packed(self, x: Tensor, decoded: PatchGrid, backend: str) -> Tensor:
        """Map packed ``(N, channels, p, p)`` to ``(N, out_channels, 2p, 2p)``, with halos from ``decoded`` alone."""
        up, options = self.up, {"padding": 1, "backend": backend}
        x = patch_conv_transpose2d(x, up.weight, up.bias, decoded, stride=2, **options)
        x = self._norm_act(patch_conv2d(x, self.conv1.weight, None, decoded, **options), backend)
        return self.norm2(patch_conv2d(x, self.conv2.weight, None, decoded, **options))

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

    With a grid of ``decoded`` patches, the blocks after the first ``dense_blocks`` run packed on these patches alone.
    """

    def __init__(self, out_chans: int, width: int = 768, levels: int = 4, dense_blocks: int = 1) -> None:
        super().__init__()
        num_blocks = strides_of(levels)[-1].bit_length() - 1
        if width < 1 or width % 2**num_blocks:
            raise UserError(f"decoder_width={width} halves {num_blocks} times: choose a multiple of {2**num_blocks}")
        if not 1 <= dense_blocks < num_blocks:
            raise UserError(
                f"dense_decoder_blocks={dense_blocks} must be at least 1 and below {num_blocks}, the blocks"
            )
        widths = [width // 2**block for block in range(num_blocks + 1)]
        # Widths of the densified maps that this decoder reads, shallow to deep.
        self.in_widths = tuple(reversed(widths[:levels]))
        self.dense_blocks = dense_blocks
        self.blocks = nn.ModuleList(UNetBlock(*pair) for pair in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], out_chans, kernel_size=1)
        self.apply(_init_weights)

    def forward(self, densified: Sequence[Tensor], decoded: PatchGrid | None = None, backend: str = "dense") -> Tensor:
        """Map densified maps, shallow to deep, to ``(B, out_chans, H, W)`` at full resolution.

        With ``backend="dense"`` whole images are convolved by PyTorch's own layers alone.

        With ``decoded``, the maps that blocks after ``dense_blocks`` read are packed on it, and so is the result,
        ``(N, out_chans, patch, patch)``.
        """
        *skips, x = densified
        blocks = cast(Iterable[UNetBlock], self.blocks)
        for index, block in enumerate(blocks):
            on = decoded if index >= self.dense_blocks else None  # None: the whole image
            if on is not None and index == self.dense_blocks:
                x = pack(x, on)
            if index > 0 and skips:
                x = x + skips.pop()
            x = block(x, backend) if on is None else block.forward_packed(x, on, backend)
        return self.head(x)


class LightDecoder(nn.Module):
    """Predict whole patches from the deepest level, as in ConvNeXt V2's FCMAE.

    One ConvNeXt V2 block at the deepest stride ``s``, then a 1x1 convolution to the ``s*s*out_chans`` pixels
    under each position. Only the deepest level is densified.

    With a grid of ``decoded`` patches, the last convolution draws these alone; their values are the same.
    """

    dense_blocks = 1  # the block mixes positions of the whole image

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
