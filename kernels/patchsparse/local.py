"""A convolution whose window never leaves its patch: no neighbour, no engine, one matrix product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .geometry import Window

__all__ = ["is_product", "local_conv2d"]


def is_product(device: str, window: Window, groups: int) -> bool:
    """Return whether :func:`local_conv2d` multiplies matrices instead of calling ``F.conv2d``.

    On a CPU a product of all packed rows is as fast as oneDNN's convolution at patches of 8 pixels and 3.5 times as
    fast at 1 (bfloat16: 1.1 to 18 times), where the convolution goes through N small images one by one
    (``benchmarks/test_pointwise.py``). A GPU keeps ``F.conv2d``: its float32 precision is not set by that of products.
    """
    return device == "cpu" and groups == 1 and window.dilation == (1, 1)


def local_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Convolve ``(N, C_in, ph, pw)`` without a halo; ``(N, C_out, ph / stride, pw / stride)`` in channels_last memory.

    Equivalent to::

        y = F.conv2d(x, weight, bias, window.stride, 0, window.dilation, groups)
    """
    if not is_product(x.device.type, window, groups):
        return F.conv2d(x, weight, bias, window.stride, 0, window.dilation, groups)
    rows = x.permute(0, 2, 3, 1)  # (N, ph, pw, C_in): a view, memory is channels_last
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, kh * kw * C_in)
    if window.taps > 1 or window.stride != (1, 1):
        (kh, kw), (sh, sw) = window.kernel, window.stride
        windows = rows.unflatten(1, (-1, sh)).unflatten(3, (-1, sw))  # (N, oh, sh, ow, sw, C_in)
        rows = windows[:, :, :kh, :, :kw].transpose(2, 3).flatten(3)  # (N, oh, ow, kh * kw * C_in)
    return F.linear(rows, matrix, bias).permute(0, 3, 1, 2)
