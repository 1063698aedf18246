"""How products of float32 are computed: exactly, or on tensor cores in TF32, as PyTorch allows; and what to round."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from ...eager import known
from .conv_kernels import round_to_tf32_kernel
from .launch import Start

__all__ = ["nearest", "precision_of", "rounding_start"]


def precision_of(x: Tensor) -> str:
    """Return ``"tf32"`` if PyTorch allows it for convolutions of float32, else ``"ieee"``; as cuDNN does."""
    if x.device.type == "cpu":
        return "widened" if x.dtype == torch.bfloat16 else "ieee"
    if x.dtype != torch.float32:
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    allowed = torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def nearest(x: Tensor) -> Tensor:
    """Return ``x`` as tensor cores should read it: in float32 rounded to the 10 bits of mantissa that TF32 has.

    They cut off the other bits, which makes every product smaller: by 7e-4 on average if both operands are cut, as
    measured on an H100, and twice as far off as cuDNN, which rounds. One operand of each product is rounded here: the
    weight, and in its own gradient that of the output.
    """
    if precision_of(x) != "tf32":
        return x
    y = torch.empty_like(x)
    rounding_start(x.numel(), x.device)(x, y)
    return y


@known
def rounding_start(values: int, device: torch.device) -> Start:
    """Return the start that rounds float32 ``values`` without gaps in memory; tensors: those, and where they go."""
    return Start(round_to_tf32_kernel, (ceil(values / 1024),), (values,), {"BLOCK": 1024})
