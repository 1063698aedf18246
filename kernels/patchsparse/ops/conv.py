"""Convolution: schema, shape function and gradient of its registered operators.

``conv2d``, ``conv2d_dgrad`` and ``conv2d_wgrad`` are the three sides of one trilinear form, so each is the gradient of
the other two and derivatives of any order exist. ``conv2d_gradients`` is two of them at once, for engines that compute
both in one pass (MinkowskiEngine).
"""

from __future__ import annotations

from torch import Tensor

from ..backends import BOTH_GRADIENTS_AT_ONCE, requested
from ..layout import packed_empty, packed_output
from .calls import Ints, body, call_on, conv_call, stencil_of
from .operands import check_like, check_packed, check_weight
from .operator import operator

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_gradients", "conv2d_wgrad"]


@operator("patchsparse::conv2d")
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    """Convolve packed ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    check_packed(x, slot, coords)
    check_weight(x, weight, bias, groups)
    stencil = stencil_of(weight.shape[2:], stride, padding, dilation)
    chosen = body(conv_call("conv2d", x, weight, stencil, groups), backend)
    return packed_output(chosen.conv2d(x, weight, bias, slot, coords, stencil, groups))


@conv2d.shape
def _(x, weight, bias, slot, coords, stride, padding, dilation, groups, backend):
    return packed_empty(x, x.shape[0], weight.shape[0], x.shape[2] // stride[0], x.shape[3] // stride[1])


@operator("patchsparse::conv2d_dgrad")
def conv2d_dgrad(
    grad: Tensor,
    weight: Tensor,
    slot: Tensor,
    coords: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    """Return the input gradient of :func:`conv2d`, which is also the transposed convolution of ``grad``."""
    check_packed(grad, slot, coords)
    check_weight(grad, weight, None, groups, transposed=True)
    stencil = stencil_of(weight.shape[2:], stride, padding, dilation)
    size = (grad.shape[2] * stride[0], grad.shape[3] * stride[1])
    channels = (weight.shape[1] * groups, weight.shape[0])
    chosen = body(call_on("conv2d_dgrad", grad, size, channels, stencil, groups), backend)
    return packed_output(chosen.conv2d_dgrad(grad, weight, slot, coords, size, stencil, groups))


@conv2d_dgrad.shape
def _(grad, weight, slot, coords, stride, padding, dilation, groups, backend):
    height, width = grad.shape[2] * stride[0], grad.shape[3] * stride[1]
    return packed_empty(grad, grad.shape[0], weight.shape[1] * groups, height, width)


@operator("patchsparse::conv2d_wgrad")
def conv2d_wgrad(
    x: Tensor,
    grad: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    """Return the weight gradient of :func:`conv2d` in channels_last memory."""
    check_packed(x, slot, coords)
    check_packed(grad, slot, coords)
    stencil = stencil_of(kernel, stride, padding, dilation)
    channels = (x.shape[1], grad.shape[1])
    chosen = body(call_on("conv2d_wgrad", x, x.shape[2:], channels, stencil, groups), backend)
    check_like(x, grad, "grad", stencil.output_size((x.shape[2], x.shape[3])), channels[1])
    return packed_output(chosen.conv2d_wgrad(x, grad, slot, coords, stencil, groups))


@conv2d_wgrad.shape
def _(x, grad, slot, coords, kernel, stride, padding, dilation, groups, backend):
    return packed_empty(x, grad.shape[1], x.shape[1] // groups, kernel[0], kernel[1])


@operator("patchsparse::conv2d_gradients")
def conv2d_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    slot: Tensor,
    coords: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`conv2d_dgrad` and :func:`conv2d_wgrad` return."""
    check_packed(x, slot, coords)
    check_weight(x, weight, None, groups)
    stencil = stencil_of(weight.shape[2:], stride, padding, dilation)
    chosen = body(conv_call("conv2d_gradients", x, weight, stencil, groups), backend)
    check_like(x, grad, "grad", stencil.output_size((x.shape[2], x.shape[3])), weight.shape[0])
    grad_x, grad_weight = chosen.conv2d_gradients(grad, x, weight, slot, coords, stencil, groups)
    return packed_output(grad_x), packed_output(grad_weight)


@conv2d_gradients.shape
def _(grad, x, weight, slot, coords, stride, padding, dilation, groups, backend):
    return packed_empty(x, *x.shape), packed_empty(weight, *weight.shape)


def _conv2d_context(ctx, inputs, output):
    x, weight, _, slot, coords, *ctx.options = inputs
    ctx.save_for_backward(x, weight, slot, coords)


def _conv2d_backward(ctx, grad):
    x, weight, slot, coords = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grid, kernel = (slot, coords), weight.shape[2:]
    if wants_x and wants_weight and requested(ctx.options[-1]) in BOTH_GRADIENTS_AT_ONCE:
        grad_x, grad_weight = conv2d_gradients(grad, x, weight, *grid, *ctx.options)
    else:
        grad_x = conv2d_dgrad(grad, weight, *grid, *ctx.options) if wants_x else None
        grad_weight = conv2d_wgrad(x, grad, *grid, kernel, *ctx.options) if wants_weight else None
    grad_bias = grad.sum((0, 2, 3)) if wants_bias else None
    return grad_x, grad_weight, grad_bias, None, None, *[None] * len(ctx.options)


def _dgrad_context(ctx, inputs, output):
    grad, weight, slot, coords, *ctx.options = inputs
    ctx.save_for_backward(grad, weight, slot, coords)


def _dgrad_backward(ctx, x):
    grad, weight, slot, coords = ctx.saved_tensors
    wants_grad, wants_weight = ctx.needs_input_grad[:2]
    grid, kernel = (slot, coords), weight.shape[2:]
    grad_grad = conv2d(x, weight, None, *grid, *ctx.options) if wants_grad else None
    grad_weight = conv2d_wgrad(x, grad, *grid, kernel, *ctx.options) if wants_weight else None
    return grad_grad, grad_weight, None, None, *[None] * len(ctx.options)


def _wgrad_context(ctx, inputs, output):
    x, grad, slot, coords, _, *ctx.options = inputs
    ctx.save_for_backward(x, grad, slot, coords)


def _wgrad_backward(ctx, weight):
    x, grad, slot, coords = ctx.saved_tensors
    wants_x, wants_grad = ctx.needs_input_grad[:2]
    grad_x = conv2d_dgrad(grad, weight, slot, coords, *ctx.options) if wants_x else None
    grad_grad = conv2d(x, weight, None, slot, coords, *ctx.options) if wants_grad else None
    return grad_x, grad_grad, None, None, None, *[None] * len(ctx.options)


def _gradients_context(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients_backward(ctx, grad_x, grad_weight):
    """Differentiate two of the three sides of one trilinear form: each part is one of the sides again."""
    grad, x, weight, slot, coords = ctx.saved_tensors
    options = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.backend)
    grid, kernel = (slot, coords), weight.shape[2:]
    wants_grad, wants_x, wants_weight = ctx.needs_input_grad[:3]
    to_grad = to_x = to_weight = None
    if wants_grad:
        to_grad = conv2d(grad_x, weight, None, *grid, *options) + conv2d(x, grad_weight, None, *grid, *options)
    if wants_x:
        to_x = conv2d_dgrad(grad, grad_weight, *grid, *options)
    if wants_weight:
        to_weight = conv2d_wgrad(grad_x, grad, *grid, kernel, *options)
    return to_grad, to_x, to_weight, *[None] * 7


conv2d.differentiable(_conv2d_context, _conv2d_backward)
conv2d_dgrad.differentiable(_dgrad_context, _dgrad_backward)
conv2d_wgrad.differentiable(_wgrad_context, _wgrad_backward)
conv2d_gradients.differentiable(_gradients_context, _gradients_backward)
