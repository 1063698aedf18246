"""A transposed convolution followed by a convolution, as one: fewer products where images are large.

``ConvTranspose2d(C, C, 4, stride=2, padding=1)`` then ``Conv2d(C, D, 3, padding=1)``, with nothing between, is one
linear map. Away from the border it is a single ``6 x 6`` transposed convolution of stride 2: 36 products for each pixel
of the small image and pair of channels, instead of 16 + 36. Composing the kernels costs about ``324 C`` products for
each such pair, which many pixels pay back (:func:`pays`). Where the C++ engine takes 3x3 convolutions of whole images,
the composed kernel is one of the small image, with the four phases of the enlarged one as channels: 16 products.

At the border the two steps differ from the one: the second step sees zeros beyond the enlarged image, where the
composed kernel would see what the transposed convolution spills over. That ring of one pixel depends on the outermost
row or column alone, so that it is computed in one dimension and subtracted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsparse import image_conv2d, image_engine

__all__ = ["compose", "pays", "upsample_conv"]

STRIDE, UP_KERNEL, KERNEL = 2, 4, 3

# Pixels of all small images for each channel from which on composing is faster. Counted: 324 / 16. Measured on two CPU
# cores, forward + backward, batch 4: 0.43x as fast at 3 (C = 384, 18 x 18), 1.10x at 27 (C = 192, 36 x 36) and 1.38x at
# 216 (C = 96, 72 x 72).
LEAST_PIXELS = 20


def pays(x: Tensor, up: nn.ConvTranspose2d) -> bool:
    """Return whether one composed convolution of ``x`` ``(B, C, H, W)`` is faster than two.

    On the meta device, where multiply-adds are counted, the two steps stay as the model defines them.
    """
    return not x.is_meta and x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS * up.in_channels


def compose(up: Tensor, weight: Tensor) -> Tensor:
    """Return the kernel ``(C, D, 6, 6)`` of both steps from ``up`` ``(C, M, 4, 4)`` and ``weight`` ``(D, M, 3, 3)``.

    Step one writes ``u[q] = sum_i x[i] up[q - 2 i + 1]``, step two ``y[p] = sum_v u[p + v - 1] weight[v]``, so
    ``y[p] = sum_i x[i] kernel[p - 2 i + 2]`` with ``kernel[k] = sum_v up[k - 2 + v] weight[v]``, itself a convolution.
    """
    ring = KERNEL - 2  # the rest of the padding
    return image_conv2d(F.pad(up, (ring, ring, ring, ring)), weight)


def upsample_conv(x: Tensor, up: nn.ConvTranspose2d, conv: nn.Conv2d, backend: str = "dense") -> Tensor:
    """Return ``conv(up(x))``, ``(B, D, 2H, 2W)``, of ``x`` ``(B, C, H, W)`` in one convolution, exactly at borders too.

    ``up`` must be 4x4 of stride 2 and padding 1, ``conv`` 3x3 of padding 1 without a bias; gradients reach both.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, spread, weight = x.to(dtype), up.weight.to(dtype), conv.weight.to(dtype)
    bias = None if up.bias is None else _bias_map(up.bias.to(dtype), weight)
    inner = None if bias is None else bias[:, 1, 1]
    kernel = compose(spread, weight)
    if image_engine(x, 4 * conv.out_channels, backend):
        y = _by_phase(x, kernel, inner, backend)
    else:
        y = F.conv_transpose2d(x, kernel, inner, STRIDE, padding=2)
    return _SubtractBorder.apply(y, *_spill(x, spread, weight, bias))  # type: ignore[no-any-return]


def _by_phase(x: Tensor, kernel: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """Return ``F.conv_transpose2d(x, kernel, bias, 2, padding=2)`` as a 3x3 convolution of the small image.

    Pixel ``2 i + a`` reads ``x[i + v - 1]`` with ``kernel[a + 4 - 2 v]``, v = 0, 1, 2: the four phases ``(a, b)`` of
    the enlarged image are four times the channels (sub-pixel convolution, arXiv 1609.05158).
    """
    c, d = kernel.shape[:2]
    taps = kernel.flip((2, 3)).reshape(c, d, 3, 2, 3, 2).flip((3, 5))  # (C, D, v, a, u, b)
    weight = taps.permute(3, 5, 1, 0, 2, 4).reshape(4 * d, c, 3, 3)
    phases = image_conv2d(x, weight, None if bias is None else bias.repeat(4), backend)
    return _Interleave.apply(phases)  # type: ignore[no-any-return]


def _bias_map(bias: Tensor, weight: Tensor) -> Tensor:
    """Return what the bias ``(M,)`` of the first step gives after the second, ``(D, 3, 3)``.

    The middle is the value of all inner pixels, the rest those of the first and last rows and columns.
    """
    return F.conv2d(bias[None, :, None, None].expand(1, -1, 3, 3), weight, padding=1)[0]


def _spill(x: Tensor, spread: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is too much in the first and last row ``(B, D, 2W)`` and column ``(B, D, 2H)``.

    The corners count as part of the rows.
    """
    found = []
    for last in (0, -1):
        row = F.conv_transpose1d(x[:, :, last], spread[:, :, last], stride=STRIDE)  # row -1 or 2H of the enlarged image
        found.append(F.conv1d(row, weight[:, :, last]))
    for last in (0, -1):
        column = F.conv_transpose1d(x[..., last], spread[..., last], stride=STRIDE, padding=1)  # without these two rows
        found.append(F.conv1d(column, weight[..., last], padding=1))
    if bias is None:
        return found[0], found[1], found[2], found[3]
    top, bottom, left, right = found
    inner = bias[:, 1, 1]
    ends, middle = (top.shape[2], left.shape[2]), inner[:, None]

    def along(three: Tensor, length: int) -> Tensor:
        """Stretch first, middle and last value to a whole row."""
        return torch.cat((three[:, :1], three[:, 1:2].expand(-1, length - 2), three[:, 2:]), 1)

    top = top + (middle - along(bias[:, 0], ends[0]))
    bottom = bottom + (middle - along(bias[:, 2], ends[0]))
    inside = F.pad(x.new_ones(ends[1] - 2), (1, 1))  # the corners are in the rows already
    left = left + (inner - bias[:, 1, 0])[:, None] * inside
    right = right + (inner - bias[:, 1, 2])[:, None] * inside
    return top, bottom, left, right


class _Interleave(torch.autograd.Function):
    """Put four phases ``(B, 4 D, H, W)`` side by side, ``(B, D, 2H, 2W)``; the result may be written to in place."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        batch, channels, height, width = phases.shape
        shape = (batch, channels // 4, 2 * height, 2 * width)
        y = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
        _phases_of(y).copy_(phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels // 4)))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _phases_of(grads[0]).flatten(3).permute(0, 3, 1, 2)


def _phases_of(image: Tensor) -> Tensor:
    """Return a view ``(B, H, W, a, b, D)`` of ``image`` ``(B, D, 2H, 2W)``."""
    return image.permute(0, 2, 3, 1).unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 2, 4, 5)


class _SubtractBorder(torch.autograd.Function):
    """Subtract from the outermost rows and columns in place; plain indexing would copy the gradient four times."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        y[:, :, 0] -= top
        y[:, :, -1] -= bottom
        y[..., 0] -= left
        y[..., -1] -= right
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        grad = grads[0]
        return grad, -grad[:, :, 0], -grad[:, :, -1], -grad[..., 0], -grad[..., -1]
