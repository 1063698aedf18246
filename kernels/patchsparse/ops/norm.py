"""Batch normalisation with an activation: schema, shape function and gradient of its registered operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import packed_empty, packed_output
from ..precision import sum_dtype
from .calls import body, norm_call
from .operands import check_same, check_vectors
from .operator import operator

__all__ = ["batch_norm_act", "batch_norm_act_grad"]


@operator("patchsparse::batch_norm_act")
def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result and the mean and biased variance used, those of ``x`` unless given."""
    check_vectors(x, weight=weight, bias=bias, mean=mean, var=var)
    check_same(x, residual=residual)
    chosen = body(norm_call("batch_norm_act", x, x.shape[0]), backend)
    y, *used = chosen.batch_norm_act(x, residual, weight, bias, mean, var, eps, activation, slope)
    return packed_output(y), *used


@batch_norm_act.shape
def _(x, residual, weight, bias, mean, var, eps, activation, slope, backend):
    return packed_empty(x, *x.shape), *(x.new_empty(x.shape[1], dtype=sum_dtype(x)) for _ in range(2))


@operator("patchsparse::batch_norm_act_grad")
def batch_norm_act_grad(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    slope: float,
    batch: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, residual (None without one), weight and bias (both as the statistics' type)."""
    check_vectors(x, weight=weight, bias=bias, mean=mean, var=var)
    check_same(x, grad=grad, residual=residual)
    chosen = body(norm_call("batch_norm_act_grad", x, x.shape[0]), backend)
    options = (eps, activation, slope, batch)
    gx, gr, gw, gb = chosen.batch_norm_act_grad(grad, x, residual, weight, bias, mean, var, *options)
    gr = None if gr is None else packed_output(gr)  # an operator may return None, its schema cannot say so
    return packed_output(gx), gr, gw, gb  # pyright: ignore[reportReturnType]


@batch_norm_act_grad.shape
def _(grad, x, residual, weight, bias, mean, var, eps, activation, slope, batch, backend):
    gr = x.new_empty(0) if residual is None else packed_empty(residual, *x.shape)
    return packed_empty(x, *x.shape), gr, torch.empty_like(mean), torch.empty_like(mean)


def _context(ctx, inputs, output):
    x, residual, weight, bias, mean, _, *ctx.options = inputs
    ctx.batch = mean is None
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, residual, weight, bias, output[1], output[2])


def _backward(ctx, grad, _mean, _var):
    if grad is None:
        return (None,) * 10
    x, residual, weight, bias, mean, var = ctx.saved_tensors
    *options, backend = ctx.options
    gx, gr, gw, gb = batch_norm_act_grad(grad, x, residual, weight, bias, mean, var, *options, ctx.batch, backend)
    gw = None if weight is None else gw.to(weight.dtype)
    gb = None if bias is None else gb.to(bias.dtype)
    return gx, None if residual is None else gr, gw, gb, None, None, *[None] * len(ctx.options)


batch_norm_act.differentiable(_context, _backward)
