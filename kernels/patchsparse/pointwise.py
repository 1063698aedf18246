"""A convolution whose stencil never leaves its patch: no neighbour, one matrix product."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import cpp
from .backends.cpp import native
from .geometry import Stencil
from .grid import whole_grid
from .ops import conv as ops
from .processor import processor_fields

__all__ = ["is_product", "local_conv2d", "local_linear", "multiplies_by_engine"]


def is_product(device: str, stencil: Stencil, groups: int) -> bool:
    """Return whether :func:`local_conv2d` multiplies matrices instead of calling ``F.conv2d``.

    On a CPU a product of all packed rows is as fast as oneDNN's convolution at patches of 8 pixels and 3.5 times as
    fast at 1 (bfloat16: 1.1 to 18 times), where the convolution goes through N small images one by one
    (``benchmarks/test_conv.py``). A GPU keeps ``F.conv2d``: its float32 precision is not set by that of products.
    """
    return device == "cpu" and groups == 1 and stencil.dilation == (1, 1)


@cache
def _products_are_slow() -> bool:
    """Return whether PyTorch's products are MKL's on an AMD processor with AVX-512, which MKL leaves unused there."""
    processor = processor_fields()
    wide = processor.get("vendor_id") == "AuthenticAMD" and "avx512f" in processor.get("flags", "").split()
    return wide and torch.backends.mkl.is_available()


def multiplies_by_engine(x: Tensor) -> bool:
    """Return whether the ``cpp`` engine does the product of ``x`` ``(N, C, ph, pw)``: float32, AMD with AVX-512.

    MKL runs at half the rate there: 1.4 to 2.2 ms for products that take this engine 0.7 to 0.9 ms and oneDNN's
    convolution 0.7 to 2.5 ms (ResNet-50's 1x1 layers of batch 4, two cores of Zen 5, ``benchmarks/test_conv.py``);
    the linear layers of a ConvNeXt-Tiny 640 ms forward and backward, this engine 230 ms (batch 4, 60 % masked).
    With AVX2 alone (Zen 3) MKL takes 0.8 to 0.9 of the engine's time.
    """
    suits = (x.device.type, x.dtype) == ("cpu", torch.float32) and x.shape[1] >= 16
    return suits and cpp.may_replace_pytorch(x) and _products_are_slow() and native.library().problem is None


def local_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stencil: Stencil, groups: int) -> Tensor:
    """Convolve ``(N, C_in, ph, pw)`` without a halo; ``(N, C_out, ph / stride, pw / stride)`` in channels_last memory.

    Equivalent to::

        y = F.conv2d(x, weight, bias, stencil.stride, 0, stencil.dilation, groups)
    """
    if not is_product(x.device.type, stencil, groups):
        return F.conv2d(x, weight, bias, stencil.stride, 0, stencil.dilation, groups)
    if multiplies_by_engine(x):
        grid, how = whole_grid(x.shape[0]), (stencil.stride, (0, 0), (1, 1), 1, "cpp")
        return ops.conv2d(x, weight, bias, grid.slot, grid.coords, *how)
    rows = x.permute(0, 2, 3, 1)  # (N, ph, pw, C_in): a view, memory is channels_last
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, kh * kw * C_in)
    if stencil.taps > 1 or stencil.stride != (1, 1):
        (kh, kw), (sh, sw) = stencil.kernel, stencil.stride
        windows = rows.unflatten(1, (-1, sh)).unflatten(3, (-1, sw))  # (N, oh, sh, ow, sw, C_in)
        rows = windows[:, :, :kh, :, :kw].transpose(2, 3).flatten(3)  # (N, oh, ow, kh * kw * C_in)
    return F.linear(rows, matrix, bias).permute(0, 3, 1, 2)


def local_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply each row of ``(N, ph, pw, C_in)``, channels last, by ``weight`` ``(C_out, C_in)``: a 1x1 convolution.

    Equivalent to::

        y = F.linear(x, weight, bias)
    """
    packed = x.permute(0, 3, 1, 2)
    if not multiplies_by_engine(packed):
        return F.linear(x, weight, bias)
    return local_conv2d(packed, weight[:, :, None, None], bias, Stencil((1, 1)), 1).permute(0, 2, 3, 1)
