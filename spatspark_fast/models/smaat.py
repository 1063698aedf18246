"""SmaAt-UNet, the small U-Net for precipitation nowcasting that the paper compares with (arXiv 2007.04417)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatspark_fast.common.errors import UserError
from spatspark_fast.models.forecaster import Forecaster

__all__ = ["CBAM", "SeparableConv", "SmaAtUNet"]

STAGES = 4  # halvings of the resolution


class SeparableConv(nn.Sequential):
    """Apply a depthwise 3x3 convolution with ``kernels`` filters a channel, then a 1x1 convolution."""

    def __init__(self, channels: int, out_channels: int, kernels: int = 2) -> None:
        super().__init__(
            nn.Conv2d(channels, channels * kernels, kernel_size=3, padding=1, groups=channels),
            nn.Conv2d(channels * kernels, out_channels, kernel_size=1),
        )


class DoubleConv(nn.Sequential):
    """Apply two separable convolutions, each followed by batch norm and ReLU."""

    def __init__(self, channels: int, out_channels: int, middle: int | None = None) -> None:
        middle = out_channels if middle is None else middle
        super().__init__(
            SeparableConv(channels, middle),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            SeparableConv(middle, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class CBAM(nn.Module):
    """Weigh channels, then positions, by their mean and maximum (arXiv 1807.06521)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.Conv2d(channels, max(channels // reduction, 1), kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(max(channels // reduction, 1), channels, kernel_size=1),
        )
        self.place = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        mean, peak = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * torch.sigmoid(self.channel(mean) + self.channel(peak))
        summary = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)
        return x * torch.sigmoid(self.norm(self.place(summary)))


class SmaAtUNet(Forecaster):
    """Forecast by a U-Net of depthwise-separable convolutions with CBAM on every skip connection.

    About 4.0 million parameters at ``base_width`` 64. Image sides must be multiples of 16. The output counts
    ``unit`` data units. Source: Trebing, Stanczyk and Mehrkanoon 2021, arXiv 2007.04417.
    """

    def __init__(self, in_length: int = 12, out_length: int = 12, base_width: int = 64, unit: float = 1.0) -> None:
        super().__init__(in_length, out_length, multiple=2**STAGES)
        if base_width < 1:
            raise UserError(f"base_width must be at least 1 channel, got {base_width}")
        # The deepest stage keeps its width, since upsampling by interpolation has no weights to halve it.
        widths = [base_width * 2**stage for stage in range(STAGES)] + [base_width * 2 ** (STAGES - 1)]
        self.unit = unit
        self.first = DoubleConv(in_length, widths[0])
        self.down = nn.ModuleList(DoubleConv(widths[i], widths[i + 1]) for i in range(STAGES))
        self.attention = nn.ModuleList(CBAM(width) for width in widths)
        self.up = nn.ModuleList()
        for stage in reversed(range(STAGES)):
            joined = 2 * widths[stage]
            out = widths[stage - 1] if stage else base_width
            self.up.append(DoubleConv(joined, out, middle=joined // 2))
        self.head = nn.Conv2d(base_width, out_length, kernel_size=1)

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``frames`` ``(B, in_length, H, W)`` to ``(B, out_length, H, W)``, both in data units."""
        self.check(frames)
        x = self.first(frames)
        skips = [self.attention[0](x)]
        for down, attention in zip(self.down, list(self.attention)[1:], strict=True):
            x = down(F.max_pool2d(x, kernel_size=2))
            skips.append(attention(x))
        x = skips.pop()
        for up in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            x = up(torch.cat((skips.pop(), x), dim=1))
        return self.head(x).to(frames.dtype) * self.unit
