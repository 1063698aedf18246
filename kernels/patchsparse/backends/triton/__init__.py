"""The ``triton`` engine: implicit GEMM kernels that read neighbouring patches through the slot map; see ``README.md``.

Runs on CUDA devices, and on the CPU under ``TRITON_INTERPRET=1`` (slowly, to check the kernels). Triton is imported
with the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import Call, Stencil

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_wgrad", "max_pool2d", "max_pool2d_grad", "why_not"]

Size = tuple[int, int]


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take the call, or None if it can."""
    try:
        from . import conv, launch
        from . import conv_kernels as kernels
    except ImportError:
        return "Triton is not installed"
    if call.device != "cuda" and not (call.device == "cpu" and launch.is_interpreted(kernels.patch_conv2d_fwd_kernel)):
        return f"needs a CUDA device; tensors are on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(call.dtype).removeprefix('torch.')} is not supported; use float32, bfloat16 or float16"
    if call.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"needs compute capability 8.0; this device has {major}.{minor}"
    if call.num_active * call.size[0] * call.size[1] >= 2**31:
        return f"{call.num_active} patches of {call.size[0]}x{call.size[1]} pixels are more than 2^31 rows"
    depthwise = call.groups == call.in_channels == call.out_channels
    if not depthwise and call.stencil.taps > conv.MOST_TAPS:
        return f"a kernel of {call.stencil.taps} taps is too large; at most {conv.MOST_TAPS}, unless depthwise"
    return None


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    from . import conv
    from . import depthwise_pool as pool

    if groups == x.shape[1] == weight.shape[0]:
        target = stencil.output_size((x.shape[2], x.shape[3]))
        return pool.depthwise(x, weight, bias, slot, coords, target, stencil, False)
    return conv.conv2d(x, weight, bias, slot, coords, stencil, groups)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``, itself a (transposed) convolution of ``grad``."""
    from . import conv
    from . import depthwise_pool as pool

    if groups == grad.shape[1] == weight.shape[1] * groups:
        return pool.depthwise(grad, weight, None, slot, coords, size, stencil, True)
    return conv.conv2d_dgrad(grad, weight, slot, coords, size, stencil, groups)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed over all active outputs."""
    from . import conv
    from . import depthwise_pool as pool

    if groups == x.shape[1] == grad.shape[1]:
        return pool.depthwise_wgrad(x, grad, slot, coords, stencil)
    return conv.conv2d_wgrad(x, grad, slot, coords, stencil, groups)


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil and the winning tap (uint8, row-major in the kernel)."""
    from . import depthwise_pool as pool

    return pool.max_pool2d(x, slot, coords, stencil)


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return the gradient at the input ``(N, C, ph, pw)``: each output's gradient goes to its winning tap."""
    from . import depthwise_pool as pool

    return pool.max_pool2d_grad(grad, tap, slot, coords, size, stencil)
