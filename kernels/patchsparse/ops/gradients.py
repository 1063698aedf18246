"""Both gradients of a convolution in one operator, for engines that compute them together (MinkowskiEngine)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.library import custom_op

from ..backends import choose, engine
from ..layout import packed_empty, packed_like
from .conv import conv2d, conv2d_dgrad, conv2d_wgrad, convolution_call

__all__ = ["conv2d_gradients"]

Ints = Sequence[int]


@custom_op("patchsparse::conv2d_gradients", mutates_args=())
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
    """Return what :func:`~patchsparse.ops.conv2d_dgrad` and :func:`~patchsparse.ops.conv2d_wgrad` return."""
    options = (stride, padding, dilation, groups, backend)
    call = convolution_call("conv2d_gradients", x, weight, *options[:-1])
    if x.shape[0] == 0:
        grad_x = conv2d_dgrad(grad, weight, slot, coords, *options)
        return grad_x, conv2d_wgrad(x, grad, slot, coords, weight.shape[2:], *options)
    chosen = engine(choose(call, backend))
    grad_x, grad_weight = chosen.conv2d_gradients(grad, x, weight, slot, coords, call.stencil, groups)
    return packed_like(grad_x), packed_like(grad_weight)


@conv2d_gradients.register_fake
def _(grad, x, weight, slot, coords, stride, padding, dilation, groups, backend):
    return packed_empty(x, *x.shape), packed_empty(weight, *weight.shape)


def _context(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_x, grad_weight):
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
    return to_grad, to_x, to_weight, *(None for _ in range(7))


conv2d_gradients.register_autograd(_backward, setup_context=_context)
