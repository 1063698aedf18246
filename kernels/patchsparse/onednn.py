"""PyTorch's convolution, clear of what oneDNN, which computes it on a CPU, gets wrong.

**Strided 1x1 convolutions of fewer than 16 channels.** Their weight gradient on channels_last images copies the pixels
that the stride keeps to a workspace with as many channels as there are, and finds them there as if there were 8 (AVX2)
or 16 (AVX-512): it writes behind the workspace. The gradient is wrong, memory is damaged, the process hangs or dies.
oneDNN 3.10 and 3.12 do it, those of PyTorch 2.11 and 2.14: https://github.com/uxlfoundation/oneDNN/issues/6035. The
pixels that the stride keeps are taken here before the convolution, which is the same product.

**Dilated convolutions in bfloat16 and float16.** Weight gradients were not finite on some processors. All of them are
computed in float32 here and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClearConv2d", "conv2d", "conv2d_backward", "keep_clear"]

_BLOCK = 16  # the channels by which the workspace is addressed, on the widest instruction set
_HALVES = (torch.bfloat16, torch.float16)


class ClearConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` by :func:`conv2d`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def keep_clear(model: nn.Module) -> nn.Module:
    """Turn the `torch.nn.Conv2d` of ``model`` that oneDNN may get wrong into `ClearConv2d`; return ``model``.

    The modules stay the objects that they are: parameters, hooks and state-dict keys do not change.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and (
            max(module.dilation) > 1 or _overruns(module.weight, module.stride, module.groups)
        ):
            module.__class__ = ClearConv2d
    return model


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve ``x`` ``(B, C_in, H, W)`` of any float dtype, on any device, with right gradients.

    Equivalent to::

        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    """
    if x.device.type == "cpu":
        if _overruns(weight, stride, groups) and not any(padding):
            return F.conv2d(x[..., :: stride[0], :: stride[1]], weight, bias)
        half = _half(x) if max(dilation) > 1 else None
        if half is not None:
            with torch.autocast("cpu", enabled=False):
                wide = (x.float(), weight.float(), None if bias is None else bias.float())
                return F.conv2d(*wide, stride, padding, dilation, groups).to(half)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``weight`` of :func:`conv2d`; what is not ``wanted`` is None.

    Of an operand whose gradient alone is wanted, only the shape, dtype and memory layout matter.
    """
    if x.device.type == "cpu":
        if max(dilation) > 1 and x.dtype in _HALVES:
            wide = (grad.float(), x.float(), weight.float())
            found = conv2d_backward(*wide, stride, padding, dilation, groups, wanted)
            grad_x, grad_weight = (g.to(x.dtype) if want else g for g, want in zip(found, wanted, strict=True))
            return grad_x, grad_weight
        if wanted == (False, True) and _overruns(weight, stride, groups) and not any(padding):
            x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )[:2]


def _overruns(weight: Tensor, stride: Sequence[int], groups: int) -> bool:
    """Whether the weight gradient of an unpadded convolution may write behind oneDNN's workspace."""
    return max(stride) > 1 and groups == 1 and weight.shape[2:] == (1, 1) and weight.shape[1] < _BLOCK


def _half(x: Tensor) -> torch.dtype | None:
    """Return the half precision that a convolution of ``x`` on a CPU has, under autocast too, or None."""
    if torch.is_autocast_enabled("cpu") and x.dtype in (torch.float32, *_HALVES):
        return torch.get_autocast_dtype("cpu")
    return x.dtype if x.dtype in _HALVES else None
