"""Which calls the ``cpp`` engine can run, which it runs faster than PyTorch, and by which method."""

from __future__ import annotations

from functools import cache

import torch

from ...geometry import Call, Stencil
from ...processor import processor_fields
from . import library, native

__all__ = ["DTYPES", "how", "leaves", "multiplies_bfloat16", "pays", "why_not", "why_unusable", "winograd"]

Size = tuple[int, int]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
MOST_ROWS = 2**31 - 1
THREE = Stencil((3, 3), (1, 1), (1, 1))
DOUBLE = Stencil((4, 4), (2, 2), (1, 1))


def why_unusable(device: str, dtype: torch.dtype) -> str | None:
    """Return why this engine cannot run on a device and dtype, or None if it can."""
    if device != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float64, not {dtype}"
    return library.load().problem


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take a call, or None if it can."""
    reason = why_unusable(call.device, call.dtype)
    if reason is not None:
        return reason
    if call.groups != 1 and not call.groups == call.in_channels == call.out_channels:
        return f"it takes groups=1 or depthwise, not groups={call.groups} with {call.in_channels} channels"
    if call.num_active * call.size[0] * call.size[1] * max(call.stencil.stride) ** 2 > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} pixels in all patches"
    around = [p + d * (k - 1) for p, k, d in zip(call.size, call.stencil.kernel, call.stencil.dilation, strict=True)]
    if call.num_active * around[0] * around[1] > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} pixels in all patches and around them"
    return None


def pays(call: Call) -> bool:
    """Return whether this engine is the faster one on a CPU, where ``gather`` hands tiles to PyTorch's own kernels.

    Measured (``benchmarks/test_conv.py``; batch 8, 60 % masked, one core of a 4th-generation Xeon), time of
    ``gather`` / time of ``cpp``, forward, input gradient, weight gradient:

    ========================  ================  ===================
    operation                 float32           bfloat16 (AMX)
    ========================  ================  ===================
    3x3, p=16, C=8            1.9 1.7 0.9       0.7 0.6 0.5
    3x3, p=16, C=32           1.5 1.5 1.2       1.3 1.2 0.8
    3x3, p=8, C=64            1.4 1.4 1.4       1.2 1.2 1.6
    3x3 stride 2, p=8, C=64   2.1 2.1 2.7       2.3 3.2 3.9
    3x3, p=1, C=512           1.1 1.0 2.1       37 46 44
    7x7 depthwise, C=96..768  3 .. 160          1.1 .. 230
    max-pooling               7                 5
    7x7 stride 2, C=12 -> 64  1.2 1.1 0.8       0.5 0.9 0.4
    ========================  ================  ===================

    In bfloat16 by vectors of pairs (AVX512_BF16, two cores of Zen 5): 1.4 1.3 0.7 at p=16, C=16; 1.0 1.1 1.4 at p=16,
    C=32; 1.3 1.3 1.5 at p=8, C=64; 7.9 12 21 at p=1, C=512; 1.9 2.2 2.8 at stride 2, p=8, C=64; 0.9 1.1 0.6 for the
    7x7. Elsewhere it is widened, which pays on small patches alone; Winograd's way reads and writes it.
    """
    if call.operation in ("product", "image_conv2d", "image_conv_transpose2d", "image_grid"):
        return True  # it leaves the others: see `leaves`
    if call.operation.startswith("max_pool2d") or call.groups != 1:
        return call.dtype != torch.float64
    weight_gradient = call.operation == "conv2d_wgrad"
    if call.dtype == torch.float32:
        return call.in_channels >= (16 if weight_gradient else 8)
    if call.dtype != torch.bfloat16:
        return False
    if multiplies_bfloat16():
        few = 64 if library.load().isa() == "amx" else 32
        return call.in_channels >= (few if weight_gradient else 16)
    tiled = winograd(call.dtype, call.size, (call.in_channels, call.out_channels), call.stencil)
    return tiled or min(call.stencil.output_size(call.size)) <= 2


def leaves(call: Call) -> str | None:
    """Return why this engine leaves an operation that PyTorch has itself to PyTorch, or None where it is faster.

    A product of matrices is faster in float32 on an AMD processor with AVX-512, where MKL runs at half the rate: 1.4
    to 2.2 ms for products that take this engine 0.7 to 0.9 ms and oneDNN's convolution 0.7 to 2.5 ms (ResNet-50's 1x1
    layers of batch 4, two cores of Zen 5, ``benchmarks/test_conv.py``); the linear layers of a ConvNeXt-Tiny take
    640 ms forward and backward, by this engine 230 ms (batch 4, 60 % masked). With AVX2 alone (Zen 3) MKL takes 0.8 to
    0.9 of this engine's time.

    A 3x3 convolution of whole images is faster by Winograd's method. A 4x4 transposed one of stride 2 is 2.2 times as
    fast as by oneDNN at 768 channels of 9 x 9 pixels, 1.3 times at 384 of 18 x 18 (forward + backward, float32,
    batch 4, two cores of Zen 5).
    """
    if call.operation == "product":
        if call.dtype != torch.float32 or call.in_channels < 16 or not products_are_slow():
            return "leaves this product to PyTorch, which is as fast"
        return None
    if call.dtype not in (torch.float32, torch.float64):
        return "leaves whole images to PyTorch, but for float32 and float64"
    channels = (call.in_channels, call.out_channels)
    if call.operation == "image_conv2d" and not winograd(call.dtype, call.size, channels, call.stencil):
        return "leaves this image to PyTorch: Winograd's method takes 3x3, even sides, 32 channels and more"
    if call.operation == "image_conv_transpose2d" and call.stencil != DOUBLE:
        return "leaves this image to PyTorch, but for a 4x4 kernel"
    return None


@cache
def products_are_slow() -> bool:
    """Return whether PyTorch's products are MKL's on an AMD processor with AVX-512, which MKL leaves unused there."""
    processor = processor_fields()
    wide = processor.get("vendor_id") == "AuthenticAMD" and "avx512f" in processor.get("flags", "").split()
    return wide and torch.backends.mkl.is_available()


def how(call: Call) -> str:
    """Return the method by which this engine computes a call, in a few words."""
    if call.operation == "product":
        return "one product of matrices by the cpp engine"
    if call.operation == "image_grid":
        return "each image is a single patch"
    if call.operation.startswith("max_pool2d") or call.groups != 1:
        return "rows by the slot map"
    channels = (call.in_channels, call.out_channels)
    return "Winograd's F(2x2, 3x3)" if winograd(call.dtype, call.size, channels, call.stencil) else "indirect GEMM"


def winograd(dtype: torch.dtype, size: Size, channels: Size, stencil: Stencil, groups: int = 1) -> bool:
    """Return whether Winograd's F(2x2, 3x3) computes a convolution of ``channels`` (input, output) and its gradients.

    Its error is that of the direct sum: the factors are 1 and 1/2. Measured against the direct way (two cores of Zen 5,
    float32, batch 8, 60 % masked, all three sides; ``benchmarks/test_conv.py``): 1.7x as fast at p=8, C=64; 1.5x
    at p=4, C=128; 1.3x at p=2, C=256; 1.4x at p=8, C=32; slower below 32 channels, where its sums are a small part.
    """
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return False  # two products or more for one of float32, and no sums around them: 1.1x (p=8) to 1.6x (p=2)
    even = size[0] % 2 == 0 and size[1] % 2 == 0
    return stencil == THREE and even and groups == 1 and min(channels) >= 32 and dtype in DTYPES


def multiplies_bfloat16() -> bool:
    """Return whether the instruction set in use multiplies bfloat16 itself: by matrix tiles, or by vectors of pairs."""
    loaded = library.load()
    return loaded.problem is None and loaded.isa_number() >= native.BF16
