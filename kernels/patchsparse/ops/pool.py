"""Pooling: schema, shape function and gradient of its registered operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import packed_empty, packed_output
from .calls import Ints, body, pool_call, stencil_of
from .operands import check_packed, check_taps
from .operator import operator

__all__ = ["avg_pool2d", "avg_pool2d_grad", "max_pool2d", "max_pool2d_grad"]


@operator("patchsparse::max_pool2d")
def max_pool2d(
    x: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil of packed ``x`` and the winning tap (uint8)."""
    check_packed(x, slot, coords)
    stencil = stencil_of(kernel, stride, padding, dilation)
    chosen = body(pool_call("max_pool2d", x, x.shape[2:], stencil), backend)
    pooled, tap = chosen.max_pool2d(x, slot, coords, stencil)
    return packed_output(pooled), packed_output(tap)


@max_pool2d.shape
def _(x, slot, coords, kernel, stride, padding, dilation, backend):
    pooled = packed_empty(x, x.shape[0], x.shape[1], x.shape[2] // stride[0], x.shape[3] // stride[1])
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@operator("patchsparse::max_pool2d_grad")
def max_pool2d_grad(
    grad: Tensor,
    tap: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    backend: str,
) -> Tensor:
    """Return the input gradient of :func:`max_pool2d`."""
    check_packed(grad, slot, coords)
    check_taps(grad, tap, kernel[0] * kernel[1])
    stencil = stencil_of(kernel, stride, padding, dilation)
    size = (grad.shape[2] * stride[0], grad.shape[3] * stride[1])
    chosen = body(pool_call("max_pool2d_grad", grad, size, stencil), backend)
    return packed_output(chosen.max_pool2d_grad(grad, tap, slot, coords, size, stencil))


@max_pool2d_grad.shape
def _(grad, tap, slot, coords, kernel, stride, padding, dilation, backend):
    return _at_the_input(grad, stride)


@operator("patchsparse::avg_pool2d")
def avg_pool2d(
    x: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    divisor: int,
    count_include_pad: bool,
    backend: str,
) -> Tensor:
    """Return the sum over each stencil by ``divisor``, or by its pixels in the image without ``count_include_pad``."""
    check_packed(x, slot, coords)
    stencil = stencil_of(kernel, stride, padding, (1, 1))
    chosen = body(pool_call("avg_pool2d", x, x.shape[2:], stencil), backend)
    return packed_output(chosen.avg_pool2d(x, slot, coords, stencil, divisor, count_include_pad))


@avg_pool2d.shape
def _(x, slot, coords, kernel, stride, padding, divisor, count_include_pad, backend):
    return packed_empty(x, x.shape[0], x.shape[1], x.shape[2] // stride[0], x.shape[3] // stride[1])


@operator("patchsparse::avg_pool2d_grad")
def avg_pool2d_grad(
    grad: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    divisor: int,
    count_include_pad: bool,
    backend: str,
) -> Tensor:
    """Return the input gradient of :func:`avg_pool2d`, its adjoint."""
    check_packed(grad, slot, coords)
    stencil = stencil_of(kernel, stride, padding, (1, 1))
    size = (grad.shape[2] * stride[0], grad.shape[3] * stride[1])
    chosen = body(pool_call("avg_pool2d_grad", grad, size, stencil), backend)
    return packed_output(chosen.avg_pool2d_grad(grad, slot, coords, size, stencil, divisor, count_include_pad))


@avg_pool2d_grad.shape
def _(grad, slot, coords, kernel, stride, padding, divisor, count_include_pad, backend):
    return _at_the_input(grad, stride)


def _at_the_input(grad: Tensor, stride: Ints) -> Tensor:
    """Return an uninitialised gradient at the input of a pooling."""
    return packed_empty(grad, grad.shape[0], grad.shape[1], grad.shape[2] * stride[0], grad.shape[3] * stride[1])


def _max_pool2d_context(ctx, inputs, output):
    _, slot, coords, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], slot, coords)


def _max_pool2d_backward(ctx, grad, _):
    grad_x = None if grad is None else max_pool2d_grad(grad, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, *(None for _ in ctx.options)


def _avg_pool2d_context(ctx, inputs, output):
    _, slot, coords, *ctx.options = inputs
    ctx.save_for_backward(slot, coords)


def _avg_pool2d_backward(ctx, grad):
    return avg_pool2d_grad(grad, *ctx.saved_tensors, *ctx.options), None, None, *(None for _ in ctx.options)


def _avg_pool2d_grad_backward(ctx, grad):
    return avg_pool2d(grad, *ctx.saved_tensors, *ctx.options), None, None, *(None for _ in ctx.options)


max_pool2d.differentiable(_max_pool2d_context, _max_pool2d_backward)
avg_pool2d.differentiable(_avg_pool2d_context, _avg_pool2d_backward)
avg_pool2d_grad.differentiable(_avg_pool2d_context, _avg_pool2d_grad_backward)
