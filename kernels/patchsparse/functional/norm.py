"""The front door of batch normalisation on packed patches."""

from __future__ import annotations

from torch import Tensor

from ..grid import PatchGrid
from ..ops import norm, norm_unpack
from ..packing import check_packed, fill_values

__all__ = ["ACTIVATIONS", "check_norm_act", "given_statistics", "patch_batch_norm_act", "patch_batch_norm_unpack"]

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
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        running_mean: ``(C,)`` float, updated in place if ``training``; None uses the statistics of the batch always.
        running_var: the same for the variance.
        training: use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: ``"identity"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        slope: of ``leaky_relu`` below zero.
        residual: ``(N, C, ph, pw)``, added before the activation, or None.
        backend: ``"auto"`` or the name of an engine; ``triton`` has kernels for it, else ``gather`` serves.

    Returns:
        ``(N, C, ph, pw)`` in channels_last memory. First derivatives only.

    Raises:
        ValueError: for an unknown activation or backend, a residual of another shape, or one value per channel in
            training.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        z = F.batch_norm(packed, running_mean, running_var, weight, bias, training, momentum, eps)
        y = activation(z if residual is None else z + residual)
    """
    check_norm_act(packed, activation, residual)
    given = given_statistics(packed, running_mean, running_var, training)
    options = (eps, activation, slope, backend)
    y, mean, var = norm.batch_norm_act(packed, residual, weight, bias, *given, *options)
    if training:
        _update_running(packed, running_mean, running_var, mean, var, momentum)
    return y


def patch_batch_norm_unpack(
    packed: Tensor,
    grid: PatchGrid,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fill: float | Tensor = 0.0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Normalise over the active pixels and lay the patches back into whole images, in one pass over memory.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        running_mean: ``(C,)`` float, updated in place if ``training``; None uses the statistics of the batch always.
        running_var: the same for the variance.
        fill: value of inactive patches: a number, or a ``(C,)`` tensor such as a learned mask token (differentiable).
            It is not normalised.
        training: use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: ``"auto"`` or the name of an engine; ``triton`` has kernels for it, else ``gather`` serves.

    Returns:
        ``(B, C, Gh * ph, Gw * pw)`` in channels_last memory and the dtype of ``packed``. First derivatives only.

    Raises:
        ValueError: if N differs from ``grid.num_active``, ``fill`` is not a number or ``(C,)``, there is one value per
            channel in training, or the backend is unknown.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        z = F.batch_norm(packed, running_mean, running_var, weight, bias, training, momentum, eps)
        x = unpack(z, grid, fill)
    """
    check_packed(packed, grid)
    given = given_statistics(packed, running_mean, running_var, training)
    values = fill_values(fill, packed)
    maps = (grid.slot, grid.coords)
    image, mean, var = norm_unpack.batch_norm_unpack(packed, values, weight, bias, *given, *maps, eps, backend)
    if training:
        _update_running(packed, running_mean, running_var, mean, var, momentum)
    return image


def check_norm_act(packed: Tensor, activation: str, residual: Tensor | None) -> None:
    """Raise ValueError for an unknown activation or a residual of another shape than ``packed``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if residual is not None and residual.shape != packed.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of packed {tuple(packed.shape)}")


def given_statistics(
    packed: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the statistics to normalise with, None for those of the batch; raise ValueError if it has one value."""
    if not training and running_mean is not None and running_var is not None:
        return running_mean, running_var
    if packed.numel() // max(1, packed.shape[1]) == 1:
        raise ValueError(f"batch statistics need more than one value per channel, got packed {tuple(packed.shape)}")
    return None, None


def _update_running(
    packed: Tensor, running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, momentum: float
) -> None:
    """Move the running statistics towards the batch's ``mean`` and biased ``var``, in place; no rows leave them.

    The operators mark ``mean`` and ``var`` as not differentiable.
    """
    count = packed.numel() // max(1, packed.shape[1])
    if running_mean is not None and running_var is not None and count > 1:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
