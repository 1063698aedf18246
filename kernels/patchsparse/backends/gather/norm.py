"""Batch normalisation with an activation, or laid out into whole images, in PyTorch: what the operators mean.

``u = (x - mean) * rstd`` throughout; sums are kept in float32, or float64 of float64. In gradients, ``batch`` says that
the statistics are those of ``x``. ``join`` is for statistics of several processes: it is given the sums of ``d`` and
``d * u`` over the rows here, ``(2, C)``, and returns the sums over all rows, times the share of rows that are here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import gather_patches, scatter_patches
from ...precision import wide

__all__ = [
    "batch_norm_act",
    "batch_norm_act_grad",
    "batch_norm_moments",
    "batch_norm_unpack",
    "batch_norm_unpack_grad",
]

Join = Callable[[Tensor], Tensor]


def batch_norm_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``(C,)`` of packed ``x`` over all its pixels; 0 where it has no rows."""
    if x.numel() == 0:
        return wide(x.new_zeros(x.shape[1])), wide(x.new_zeros(x.shape[1]))
    var, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    return mean, var


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result and the mean and biased variance used, those of ``x`` unless given."""
    mean, var = _used_statistics(x, mean, var)
    z = _scaled(_normalised(x, mean, (var + eps).rsqrt()), weight, bias)
    z = z if residual is None else z + residual
    return _activated(z, activation, slope).to(x.dtype), mean, var


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
    join: Join | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients at x, residual, weight and bias."""
    rstd = (var + eps).rsqrt()
    u = _normalised(x, mean, rstd)
    z = _scaled(u, weight, bias)
    d = wide(grad) * _derived(z if residual is None else z + residual, activation, slope)
    gx, gw, gb = _gradients(d, u, rstd, weight, batch, join)
    return gx.to(x.dtype), None if residual is None else d.to(residual.dtype), gw, gb


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images, and the mean and biased variance used, those of ``x`` unless given."""
    mean, var = _used_statistics(x, mean, var)
    z = _scaled(_normalised(x, mean, (var + eps).rsqrt()), weight, bias).to(x.dtype)
    return scatter_patches(z, slot, coords, None if fill is None else fill.to(x.dtype)), mean, var


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
    join: Join | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, weight, bias and fill."""
    rstd = (var + eps).rsqrt()
    u = _normalised(x, mean, rstd)
    gx, gw, gb = _gradients(wide(gather_patches(grad, slot, coords)), u, rstd, weight, batch, join)
    tiles = wide(grad).unflatten(2, (slot.shape[1], -1)).unflatten(4, (slot.shape[2], -1))  # (B, C, Gh, ph, Gw, pw)
    gf = torch.where(slot[:, None] < 0, tiles.sum((3, 5)), 0).sum((0, 2, 3))
    return gx.to(x.dtype), gw, gb, gf


def _used_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return views of the given mean and variance, or those of ``x``; 0 where it has no rows."""
    if mean is not None and var is not None:
        return wide(mean).detach(), wide(var).detach()
    return batch_norm_moments(x)


def _column(values: Tensor) -> Tensor:
    """Return ``(C,)`` as ``(C, 1, 1)`` in the type that sums are kept in."""
    return wide(values).view(-1, 1, 1)


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return ``u = (x - mean) * rstd``."""
    return (wide(x) - _column(mean)) * _column(rstd)


def _scaled(u: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``u * weight + bias``."""
    z = u if weight is None else u * _column(weight)
    return z if bias is None else z + _column(bias)


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
    return 1.0 if below is None else torch.ones_like(z).masked_fill_(z <= 0, below)  # the slope in the dtype of z


def _gradients(
    d: Tensor, u: Tensor, rstd: Tensor, weight: Tensor | None, batch: bool, join: Join | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at x, weight and bias, where ``d`` is the gradient at ``u * weight + bias``."""
    gb, gw = d.sum((0, 2, 3)), (d * u).sum((0, 2, 3))
    if batch:
        count = max(1, d.numel() // d.shape[1])
        sum_d, sum_du = (gb, gw) if join is None else join(torch.stack((gb, gw)))
        d = d - (_column(sum_d) + u * _column(sum_du)) / count
    gx = d * _column(rstd)
    return gx if weight is None else gx * _column(weight), gw, gb
