"""What the registered operators share: how a call is described, and whose body takes it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..backends import choose, engine
from ..eager import once
from ..geometry import POINT, Call, Stencil, pair

__all__ = ["Ints", "body", "call_on", "conv_call", "is_plain", "norm_call", "pool_call", "stencil_of"]

Ints = Sequence[int]


@once
def stencil_of(kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Stencil:
    """Return the stencil of an operator's lists of two ints; raise ValueError naming one of another length."""
    named = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return Stencil(*(pair(value, name) for name, value in named.items()))


def body(call: Call, backend: str) -> ModuleType:
    """Return the module of the engine that takes a call; raise as :func:`patchsparse.backends.choose` does."""
    return engine(choose(call, backend))


def call_on(
    operation: str,
    x: Tensor,
    size: Ints,
    channels: tuple[int, int],
    stencil: Stencil = POINT,
    groups: int = 1,
    plain: bool = True,
) -> Call:
    """Return a call on packed ``x`` with patches of ``size`` pixels and ``channels`` (input, output)."""
    return Call(operation, x.device.type, x.dtype, x.shape[0], (size[0], size[1]), *channels, stencil, groups, plain)


def conv_call(operation: str, x: Tensor, weight: Tensor, stencil: Stencil, groups: int) -> Call:
    """Return the call of a convolution of packed ``x`` with ``weight``, or of one of its gradients."""
    return call_on(operation, x, x.shape[2:], (x.shape[1], weight.shape[0]), stencil, groups)


def pool_call(operation: str, x: Tensor, size: Ints, stencil: Stencil) -> Call:
    """Return the call of a pooling of packed ``x``: each channel is a group."""
    return call_on(operation, x, size, (x.shape[1], x.shape[1]), stencil, x.shape[1])


def norm_call(operation: str, x: Tensor, patches: int) -> Call:
    """Return the call of a normalisation of packed ``x`` that goes through ``patches`` patches."""
    count, channels, height, width = x.shape
    number = patches if count else 0
    return Call(operation, x.device.type, x.dtype, number, (height, width), channels, channels, POINT)


def is_plain(x: Tensor) -> bool:
    """Return whether a call on ``x`` is eager, on a plain tensor that has values, and outside autocast."""
    if type(x) is not Tensor or x.is_meta or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled(x.device.type)
