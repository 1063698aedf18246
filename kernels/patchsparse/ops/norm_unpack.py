"""Batch normalisation laid out into whole images: schema, shape function and gradient of its registered operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import packed_empty, packed_output
from ..precision import sum_dtype
from .calls import body, norm_call
from .operands import check_image, check_packed, check_vectors
from .operator import operator

__all__ = ["batch_norm_unpack", "batch_norm_unpack_grad"]


@operator("patchsparse::batch_norm_unpack")
def batch_norm_unpack(
    x: Tensor,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images and the mean and biased variance used, those of ``x`` unless given."""
    check_packed(x, slot, coords)
    check_vectors(x, fill=fill, weight=weight, bias=bias, mean=mean, var=var)
    chosen = body(norm_call("batch_norm_unpack", x, slot.numel()), backend)
    image, *used = chosen.batch_norm_unpack(x, fill, weight, bias, mean, var, slot, coords, eps)
    return packed_output(image), *used


@batch_norm_unpack.shape
def _(x, fill, weight, bias, mean, var, slot, coords, eps, backend):
    height, width = x.shape[2] * slot.shape[1], x.shape[3] * slot.shape[2]
    statistics = (x.new_empty(x.shape[1], dtype=sum_dtype(x)) for _ in range(2))
    return packed_empty(x, slot.shape[0], x.shape[1], height, width), *statistics


@operator("patchsparse::batch_norm_unpack_grad")
def batch_norm_unpack_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    slot: Tensor,
    coords: Tensor,
    eps: float,
    batch: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, weight, bias and fill; all but the first in the statistics' type."""
    check_packed(x, slot, coords)
    check_image(grad, slot, coords)
    check_vectors(x, weight=weight, mean=mean, var=var)
    chosen = body(norm_call("batch_norm_unpack_grad", x, slot.numel()), backend)
    gx, gw, gb, gf = chosen.batch_norm_unpack_grad(grad, x, weight, mean, var, slot, coords, eps, batch)
    return packed_output(gx), gw, gb, gf


@batch_norm_unpack_grad.shape
def _(grad, x, weight, mean, var, slot, coords, eps, batch, backend):
    return packed_empty(x, *x.shape), *(torch.empty_like(mean) for _ in range(3))


def _context(ctx, inputs, output):
    x, fill, weight, bias, mean, _, slot, coords, *ctx.options = inputs
    ctx.batch = mean is None
    ctx.fill, ctx.bias = (None if t is None else t.dtype for t in (fill, bias))
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1], output[2], slot, coords)


def _backward(ctx, grad, _mean, _var):
    if grad is None:
        return (None,) * 10
    x, weight, mean, var, slot, coords = ctx.saved_tensors
    eps, backend = ctx.options
    gx, gw, gb, gf = batch_norm_unpack_grad(grad, x, weight, mean, var, slot, coords, eps, ctx.batch, backend)
    gf = None if ctx.fill is None else gf.to(ctx.fill)
    gw = None if weight is None else gw.to(weight.dtype)
    gb = None if ctx.bias is None else gb.to(ctx.bias)
    return gx, gf, gw, gb, None, None, None, None, None, None


batch_norm_unpack.differentiable(_context, _backward)
