"""Batch normalisation over the rows of several processes: one exchange of a small tensor forward, one backward.

A hook cannot be an argument of a registered operator, so these are autograd functions, and eager only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import packed_output
from .calls import body, norm_call

__all__ = ["AllGather", "joined_batch_norm_act", "joined_batch_norm_unpack", "joined_moments"]

AllGather = Callable[[Tensor], Tensor]


def joined_moments(mean: Tensor, var: Tensor, rows: int, all_gather: AllGather) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and number of the rows of all processes, from those of the ``rows`` here.

    Merged as by Chan, Golub and LeVeque (1979), in the order of the processes: the same bits on each of them.
    """
    parts = all_gather(torch.cat((mean, var, mean.new_full((1,), rows))))
    means, variances, counts = parts.split((len(mean), len(var), 1), dim=1)
    count = counts.sum()
    shares = counts / count.clamp(min=1)
    away = means - means[:1]  # differences keep their digits if |mean| is large
    shift = (away * shares).sum(0)
    return means[0] + shift, ((variances + (away - shift).square()) * shares).sum(0), count


def _joining_sums(rows: int, count: Tensor, all_gather: AllGather) -> Callable[[Tensor], Tensor]:
    """Return what an engine calls ``join``: see ``patchsparse/backends/gather/norm.py``."""

    def join(sums: Tensor) -> Tensor:
        return all_gather(sums.flatten()).sum(0).view_as(sums) * (rows / count.clamp(min=1))

    return join


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, eps, activation, slope, backend, all_gather):
        chosen = body(norm_call("batch_norm_act", x, x.shape[0]), backend)
        ctx.rows = x.numel() // max(1, x.shape[1])
        mean, var = chosen.batch_norm_moments(x)
        mean, var, count = joined_moments(mean, var, ctx.rows, all_gather)
        y, *_ = chosen.batch_norm_act(x, residual, weight, bias, mean, var, eps, activation, slope)
        ctx.options, ctx.backend, ctx.all_gather = (eps, activation, slope), backend, all_gather
        ctx.save_for_backward(x, residual, weight, bias, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        return packed_output(y), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, residual, weight, bias, mean, var, count = ctx.saved_tensors
        chosen = body(norm_call("batch_norm_act_grad", x, x.shape[0]), ctx.backend)
        join = _joining_sums(ctx.rows, count, ctx.all_gather)
        operands = (grads[0], x, residual, weight, bias, mean, var)
        gx, gr, gw, gb = chosen.batch_norm_act_grad(*operands, *ctx.options, True, join)
        return gx, gr, _as(gw, weight), _as(gb, bias), None, None, None, None, None


class _NormUnpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, fill, weight, bias, slot, coords, eps, backend, all_gather):
        chosen = body(norm_call("batch_norm_unpack", x, slot.numel()), backend)
        ctx.rows = x.numel() // max(1, x.shape[1])
        mean, var = chosen.batch_norm_moments(x)
        mean, var, count = joined_moments(mean, var, ctx.rows, all_gather)
        image, *_ = chosen.batch_norm_unpack(x, fill, weight, bias, mean, var, slot, coords, eps)
        ctx.eps, ctx.backend, ctx.all_gather = eps, backend, all_gather
        ctx.save_for_backward(x, fill, weight, bias, mean, var, count, slot, coords)
        ctx.mark_non_differentiable(mean, var, count)
        return packed_output(image), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, fill, weight, bias, mean, var, count, *maps = ctx.saved_tensors
        chosen = body(norm_call("batch_norm_unpack_grad", x, maps[0].numel()), ctx.backend)
        join = _joining_sums(ctx.rows, count, ctx.all_gather)
        gx, gw, gb, gf = chosen.batch_norm_unpack_grad(grads[0], x, weight, mean, var, *maps, ctx.eps, True, join)
        return gx, _as(gf, fill), _as(gw, weight), _as(gb, bias), None, None, None, None, None


def _as(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Return the gradient in the dtype of its parameter, None where there is none."""
    return None if parameter is None else grad.to(parameter.dtype)


joined_batch_norm_act: Callable[..., Any] = torch.compiler.disable(_NormAct.apply)
joined_batch_norm_unpack: Callable[..., Any] = torch.compiler.disable(_NormUnpack.apply)
