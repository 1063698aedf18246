"""Move patches between whole images and the packed layout; the plain functions behind ``pack`` and ``unpack``.

Packed is an ordinary tensor ``(N, C, ph, pw)`` in channels_last memory whose batch dimension is the list of active
patches. ``(N, C, 1, 1)`` and ``(N, 1, ph, pw)`` are contiguous *and* channels_last, so strides are always set outright.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_operand", "gather_patches", "packed_empty", "packed_like", "packed_output", "scatter_patches"]


def packed_empty(like: Tensor, count: int | torch.SymInt, channels: int, height: int, width: int) -> Tensor:
    """Return an uninitialised packed tensor ``(N, C, ph, pw)`` with channels_last strides, also where sizes are 1."""
    strides = (height * width * channels, 1, width * channels, channels)
    return like.new_empty_strided((count, channels, height, width), strides)


def packed_like(x: Tensor) -> Tensor:
    """Return ``x`` ``(N, C, ph, pw)`` with channels_last strides: itself where it has them."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else packed_empty(x, *x.shape).copy_(x)


def packed_output(x: Tensor) -> Tensor:
    """Return what an engine computed as an operator hands it out: with channels_last strides, and no view.

    Autograd refuses to train where a view that was made inside of a function is modified in place, as an in-place
    activation does.
    """
    x = packed_like(x)
    return x.data if x._is_view() else x  # the same memory, as a tensor in its own right


def dense_operand(x: Tensor, stride: tuple[int, int], groups: int) -> Tensor:
    """Return ``x`` with plain strides if it has one channel or one in each group, for PyTorch's own convolution.

    With channels_last strides and unequal strides such as (1, 2), ``F.conv2d`` on the CPU returns wrong numbers then:
    in float32 with one channel in and out, in bfloat16 also with groups (seen in PyTorch 2.14 and 2.15). The same
    tensor with plain strides is right.
    """
    if x.shape[1] == 1:
        return x.squeeze(1).unsqueeze(1)
    return x.contiguous() if groups == x.shape[1] and stride[0] != stride[1] and x.is_cpu else x


def gather_patches(image: Tensor, slot: Tensor, coords: Tensor) -> Tensor:
    """Return the active patches ``(N, C, H / Gh, W / Gw)`` of ``image`` ``(B, C, H, W)``."""
    rows, columns = slot.shape[1:]
    batch, channels, height, width = image.shape
    patches = image.permute(0, 2, 3, 1).reshape(batch, rows, height // rows, columns, width // columns, channels)
    number, row, column = coords.long().unbind(1)
    return patches.transpose(2, 3)[number, row, column].permute(0, 3, 1, 2)


def scatter_patches(packed: Tensor, slot: Tensor, coords: Tensor, fill: Tensor | None = None) -> Tensor:
    """Return the image ``(B, C, H, W)`` in channels_last memory with ``fill`` ``(C,)`` or 0 at inactive patches."""
    batch, rows, columns = slot.shape
    _, channels, height, width = packed.shape
    image = packed_empty(packed, batch, channels, rows * height, columns * width)
    if fill is None:
        image.zero_()
    else:
        image.copy_(fill[:, None, None])
    tiles = image.permute(0, 2, 3, 1).view(batch, rows, height, columns, width, channels).transpose(2, 3)
    number, row, column = coords.long().unbind(1)
    tiles[number, row, column] = packed.permute(0, 2, 3, 1)
    return image
