"""The ``triton`` engine: implicit GEMM kernels that read neighbouring patches through the slot map; see ``README.md``.

Runs on CUDA devices, and on the CPU under ``TRITON_INTERPRET=1`` (slowly, to check the kernels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import Call, Stencil
from . import conv, depthwise_pool, stem
from .conv_kernels import patch_conv2d_fwd_kernel
from .depthwise_pool import max_pool2d, max_pool2d_grad
from .launch import is_interpreted
from .norm import batch_norm_act, batch_norm_act_grad, batch_norm_moments, move_running
from .norm_unpack import batch_norm_unpack, batch_norm_unpack_grad
from .tuned import tuned_for

__all__ = [
    "batch_norm_act",
    "batch_norm_act_grad",
    "batch_norm_moments",
    "batch_norm_unpack",
    "batch_norm_unpack_grad",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "how",
    "max_pool2d",
    "max_pool2d_grad",
    "move_running",
    "why_not",
    "why_unusable",
]

Size = tuple[int, int]


def why_unusable(device: str, dtype: torch.dtype) -> str | None:
    """Return why this engine cannot run on a device and dtype, or None if it can."""
    if device != "cuda" and not (device == "cpu" and is_interpreted(patch_conv2d_fwd_kernel)):
        return f"needs a CUDA device; tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is not supported; use float32, bfloat16 or float16"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"needs compute capability 8.0; this device has {major}.{minor}"
    return None


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take the call, or None if it can."""
    reason = why_unusable(call.device, call.dtype)
    if reason is not None:
        return reason
    if call.num_active * call.size[0] * call.size[1] >= 2**31:
        return f"{call.num_active} patches of {call.size[0]}x{call.size[1]} pixels are more than 2^31 rows"
    if not _depthwise(call) and not _stem(call) and call.stencil.taps > conv.MOST_TAPS:
        return f"a kernel of {call.stencil.taps} taps is too large; at most {conv.MOST_TAPS}, unless depthwise"
    return None


def how(call: Call) -> str:
    """Return the method by which this engine computes a call, in a few words."""
    if call.operation.startswith("conv2d"):
        if _depthwise(call):
            return "depthwise kernel"
        return f"{'space-to-depth, ' if _stem(call) else ''}implicit GEMM{tuned_for(call)}"
    return "one kernel" if call.operation.startswith("max_pool2d") else "fused kernels"


def _depthwise(call: Call) -> bool:
    return call.groups == call.in_channels == call.out_channels


def _stem(call: Call) -> bool:
    return stem.pays(call.in_channels, call.size, call.stencil, call.groups)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    if groups == x.shape[1] == weight.shape[0]:
        target = stencil.output_size((x.shape[2], x.shape[3]))
        return depthwise_pool.depthwise(x, weight, bias, slot, coords, target, stencil, False)
    if stem.pays(x.shape[1], (x.shape[2], x.shape[3]), stencil, groups):
        return stem.conv2d(x, weight, bias, slot, coords, stencil)
    return conv.conv2d(x, weight, bias, slot, coords, stencil, groups)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``, itself a (transposed) convolution of ``grad``."""
    if groups == grad.shape[1] == weight.shape[1] * groups:
        return depthwise_pool.depthwise(grad, weight, None, slot, coords, size, stencil, True)
    if stem.pays(weight.shape[1], size, stencil, groups):
        return stem.conv2d_dgrad(grad, weight, slot, coords, size, stencil)
    return conv.conv2d_dgrad(grad, weight, slot, coords, size, stencil, groups)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed over all active outputs."""
    if groups == x.shape[1] == grad.shape[1]:
        return depthwise_pool.depthwise_wgrad(x, grad, slot, coords, stencil)
    if stem.pays(x.shape[1], (x.shape[2], x.shape[3]), stencil, groups):
        return stem.conv2d_wgrad(x, grad, slot, coords, stencil)
    return conv.conv2d_wgrad(x, grad, slot, coords, stencil, groups)
