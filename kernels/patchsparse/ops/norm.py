"""Fused batch normalisation + activation (+ residual) over packed patches: registered operators and public function.

The pure-PyTorch versions here are the specification and serve every device; on a GPU the Triton engine implements them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ..backends import engine
from ..geometry import Call, Stencil
from ..layout import packed_empty, packed_like

__all__ = ["ACTIVATIONS", "patch_batch_norm_act"]

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu")


def patch_batch_norm_act(
    packed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    slope: float = 0.01,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise over the active pixels, add a residual and apply an activation, in one pass over memory.

    Args:
        packed: ``(N, C, ph, pw)``.
        weight, bias: ``(C,)`` or None.
        running_mean, running_var: ``(C,)`` float, updated in place if ``training``; None uses batch statistics always.
        training: use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: ``"identity"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        slope: of ``leaky_relu`` below zero.
        residual: ``(N, C, ph, pw)``, added before the activation, or None.
        backend: ``"auto"`` (Triton on a GPU), ``"triton"`` or ``"gather"`` (plain PyTorch).

    Returns:
        ``(N, C, ph, pw)`` in channels_last memory. First derivatives only.

    Raises:
        ValueError: for an unknown activation, a residual of another shape, or one value per channel in training.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        z = F.batch_norm(packed, running_mean, running_var, weight, bias, training, momentum, eps)
        y = activation(z if residual is None else z + residual)
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if residual is not None and residual.shape != packed.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of packed {tuple(packed.shape)}")
    given = given_statistics(packed, running_mean, running_var, training)
    y, mean, var = batch_norm_act(packed, residual, weight, bias, *given, eps, activation, slope, backend)
    if training:
        update_running(packed, running_mean, running_var, mean, var, momentum)
    return y


def given_statistics(
    packed: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the statistics to normalise with, None for those of the batch; raise ValueError if it has one value."""
    if not training and running_mean is not None and running_var is not None:
        return running_mean, running_var
    if packed.numel() // max(1, packed.shape[1]) == 1:
        raise ValueError(f"batch statistics need more than one value per channel, got packed {tuple(packed.shape)}")
    return None, None


def update_running(
    packed: Tensor, running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, momentum: float
) -> None:
    """Move the running statistics towards the batch's ``mean`` and biased ``var``, in place; no rows leave them."""
    count = packed.numel() // max(1, packed.shape[1])
    if running_mean is not None and running_var is not None and count > 1:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def uses_triton(operation: str, x: Tensor, patches: int, backend: str) -> bool:
    """Return whether Triton takes a call on ``patches``; raise RuntimeError if it is named and cannot."""
    if x.numel() == 0 or (backend == "auto" and x.device.type != "cuda") or backend not in ("auto", "triton"):
        return False
    size = (x.shape[2], x.shape[3])
    call = Call(operation, x.device.type, x.dtype, patches, size, x.shape[1], x.shape[1], Stencil((1, 1)))
    reason = engine("triton").why_not(call)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run {operation}: {reason}")
    return reason is None


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in the type that sums are kept in."""
    return x if x.dtype == torch.float64 else x.float()


def column(values: Tensor) -> Tensor:
    """Return ``(C,)`` as ``(C, 1, 1)`` in the type that sums are kept in."""
    return wide(values)[:, None, None]


def used_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None, fast: bool) -> tuple[Tensor, Tensor]:
    """Return new tensors: the given mean and variance, or those of ``x``, by Triton if ``fast``."""
    if mean is not None and var is not None:
        return wide(mean).clone(), wide(var).clone()
    if fast:
        from ..backends.triton import norm

        return norm.moments(x)
    if x.numel() == 0:
        return wide(x.new_zeros(x.shape[1])), wide(x.new_zeros(x.shape[1]))
    var, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    return mean, var


def normalised(
    x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``u = (x - mean) * rstd`` and ``z = u * weight + bias + residual``."""
    u = z = (wide(x) - column(mean)) * column(rstd)
    z = z if weight is None else z * column(weight)
    z = z if bias is None else z + column(bias)
    return u, z if residual is None else z + residual


def _activated(z: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    return F.silu(z) if activation == "silu" else z


def _derived(z: Tensor, activation: str, slope: float) -> Tensor | float:
    """Return the derivative of the activation at ``z``."""
    if activation == "silu":
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    below = {"relu": 0.0, "leaky_relu": slope}.get(activation)
    return 1.0 if below is None else torch.where(z <= 0, below, 1.0).to(z.dtype)


@custom_op("patchsparse::batch_norm_act", mutates_args=())
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
    fast = uses_triton("batch_norm_act", x, x.shape[0], backend)
    used = used_statistics(x, mean, var, fast)
    statistics = (used[0], (used[1] + eps).rsqrt(), weight, bias)
    if fast:
        from ..backends.triton import norm

        return norm.apply(x, residual, statistics, activation, slope), *used
    z = normalised(x, residual, *statistics)[1]
    return packed_like(_activated(z, activation, slope).to(x.dtype)), *used


@batch_norm_act.register_fake
def _(x, residual, weight, bias, mean, var, eps, activation, slope, backend):
    return packed_empty(x, *x.shape), *(wide(x.new_empty(x.shape[1])) for _ in range(2))


@custom_op("patchsparse::batch_norm_act_grad", mutates_args=())
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
    """Return the gradients at x, residual (empty without one), weight and bias (both as the statistics' type)."""
    statistics = (mean, (var + eps).rsqrt(), weight, bias)
    if uses_triton("batch_norm_act", x, x.shape[0], backend):
        from ..backends.triton import norm

        gx, gr, gw, gb = norm.grad(grad, x, residual, statistics, activation, slope, batch)
        return gx, x.new_empty(0) if gr is None else gr, gw.clone(), gb.clone()
    u, z = normalised(x, residual, *statistics)
    d = wide(grad) * _derived(z, activation, slope)
    gb, gw = d.sum((0, 2, 3)), (d * u).sum((0, 2, 3))
    count = max(1, x.numel() // x.shape[1])
    inner = d - (column(gb) + u * column(gw)) / count if batch else d
    gx = inner * column(statistics[1])
    gx = gx if weight is None else gx * column(weight)
    gr = x.new_empty(0) if residual is None else packed_like(d.to(residual.dtype).clone())
    return packed_like(gx.to(x.dtype)), gr, gw, gb


@batch_norm_act_grad.register_fake
def _(grad, x, residual, weight, bias, mean, var, eps, activation, slope, batch, backend):
    gr = x.new_empty(0) if residual is None else packed_empty(residual, *x.shape)
    return packed_empty(x, *x.shape), gr, torch.empty_like(mean), torch.empty_like(mean)


def _context(ctx, inputs, output):
    x, residual, weight, bias, mean, _, *ctx.options = inputs
    ctx.batch = mean is None
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, residual, weight, bias, output[1], output[2])


def _backward(ctx, grad, _mean, _var):
    x, residual, weight, bias, mean, var = ctx.saved_tensors
    *options, backend = ctx.options
    gx, gr, gw, gb = batch_norm_act_grad(grad, x, residual, weight, bias, mean, var, *options, ctx.batch, backend)
    gw = None if weight is None else gw.to(weight.dtype)
    gb = None if bias is None else gb.to(bias.dtype)
    return gx, None if residual is None else gr, gw, gb, None, None, *(None for _ in ctx.options)


batch_norm_act.register_autograd(_backward, setup_context=_context)
