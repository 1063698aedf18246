"""The front door of batch normalisation on packed patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..backends import FUSED_NORMS, choose, engine
from ..eager import is_traced
from ..grid import PatchGrid
from ..ops import norm, norm_unpack
from ..ops.calls import norm_call
from ..ops.joined_norm import AllGather, joined_batch_norm_act, joined_batch_norm_unpack
from ..ops.operands import check_vectors
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
    all_gather: AllGather | None = None,
    batches: Tensor | None = None,
) -> Tensor:
    """Normalise over the active pixels, add a residual and apply an activation, in one pass over memory.

    Args:
        packed: ``(N, C, ph, pw)``.
        weight, bias: ``(C,)`` or None.
        running_mean: ``(C,)`` float, updated in place if ``training``; None uses the statistics of the batch always.
        running_var: the same for the variance.
        training: use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: ``"identity"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        slope: of ``leaky_relu`` below zero.
        residual: ``(N, C, ph, pw)``, added before the activation, or None.
        backend: ``"auto"`` or the name of an engine; ``triton`` has kernels for it, else ``gather`` serves.
        all_gather: for statistics of a batch that several processes share: maps the ``(K,)`` of this process to the
            ``(processes, K)`` of all, as `torch.distributed.all_gather_into_tensor` does. Called once in each pass, by
            any number of rows, also none. Gradients at ``weight`` and ``bias`` are those of the rows here. Eager only.
        batches: ``()`` int64, counted up by one if ``training``, or None.

    Returns:
        ``(N, C, ph, pw)`` in channels_last memory. First derivatives only.

    Raises:
        ValueError: for an unknown activation or backend, a residual or vectors of another shape or device, numbers out
            of range, or one value per channel in training.
        TypeError: if ``packed`` or a vector is of no float dtype, or ``momentum`` no number.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        z = F.batch_norm(packed, running_mean, running_var, weight, bias, training, momentum, eps)
        y = activation(z if residual is None else z + residual)
    """
    check_norm_act(packed, activation, slope, residual)
    _check_norm(packed, (weight, bias, running_mean, running_var), (eps, momentum), training, bool(all_gather))
    given = given_statistics(packed, running_mean, running_var, training, all_gather is not None)
    operands, options = (packed, residual, weight, bias), (eps, activation, slope, backend)
    if all_gather is None or given[0] is not None:
        (y, mean, var), count = norm.batch_norm_act(*operands, *given, *options), _rows(packed)
    else:
        y, mean, var, count = joined_batch_norm_act(*operands, *options, all_gather)
    if training:
        _update_running((running_mean, running_var, batches), mean, var, count, momentum, packed, backend)
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
    all_gather: AllGather | None = None,
    batches: Tensor | None = None,
) -> Tensor:
    """Normalise over the active pixels and lay the patches back into whole images, in one pass over memory.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        weight, bias: ``(C,)`` or None.
        running_mean: ``(C,)`` float, updated in place if ``training``; None uses the statistics of the batch always.
        running_var: the same for the variance.
        fill: value of inactive patches: a number, or a ``(C,)`` tensor such as a learned mask token (differentiable).
            It is not normalised.
        training: use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: ``"auto"`` or the name of an engine; ``triton`` has kernels for it, else ``gather`` serves.
        all_gather: for statistics of a batch that several processes share: maps the ``(K,)`` of this process to the
            ``(processes, K)`` of all, as `torch.distributed.all_gather_into_tensor` does. Called once in each pass, by
            any number of rows, also none. Gradients at ``weight`` and ``bias`` are those of the rows here. Eager only.
        batches: ``()`` int64, counted up by one if ``training``, or None.

    Returns:
        ``(B, C, Gh * ph, Gw * pw)`` in channels_last memory and the dtype of ``packed``. First derivatives only.

    Raises:
        ValueError: if N differs from ``grid.num_active``, vectors have another shape or device, ``fill`` is not a
            number or ``(C,)``, numbers are out of range, or there is one value per channel in training.
        TypeError: if ``packed`` or a vector is of no float dtype, ``momentum`` no number, or ``grid`` no grid.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        z = F.batch_norm(packed, running_mean, running_var, weight, bias, training, momentum, eps)
        x = unpack(z, grid, fill)
    """
    check_packed(packed, grid)
    _check_norm(packed, (weight, bias, running_mean, running_var), (eps, momentum), training, bool(all_gather))
    given = given_statistics(packed, running_mean, running_var, training, all_gather is not None)
    operands = (packed, fill_values(fill, packed), weight, bias)
    maps = (grid.slot, grid.coords)
    if all_gather is None or given[0] is not None:
        (image, mean, var), count = norm_unpack.batch_norm_unpack(*operands, *given, *maps, eps, backend), _rows(packed)
    else:
        image, mean, var, count = joined_batch_norm_unpack(*operands, *maps, eps, backend, all_gather)
    if training:
        _update_running((running_mean, running_var, batches), mean, var, count, momentum, packed, backend)
    return image


def check_norm_act(packed: Tensor, activation: str, slope: float, residual: Tensor | None) -> None:
    """Raise ValueError for an unknown activation, no slope, or a residual of another shape than ``packed``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if not abs(slope) <= torch.finfo(torch.float32).max:
        raise ValueError(f"slope must be a finite float32 number, got {slope}")
    if residual is not None and residual.shape != packed.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of packed {tuple(packed.shape)}")


def _check_norm(
    packed: Tensor, vectors: Sequence[Tensor | None], numbers: tuple[float, float], training: bool, joined: bool
) -> None:
    """Raise for ``numbers``, eps and momentum, out of range, and for wrong ``vectors`` that no operator looks at.

    In training an operator does not see the running statistics; ``joined`` ones are taken by none.
    """
    eps, momentum = numbers
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    if training or joined:
        if type(momentum) is not float and (isinstance(momentum, bool) or not isinstance(momentum, Real)):
            raise TypeError(f"momentum must be a number, got {momentum!r}; 1 / batches gives a cumulative average")
        check_vectors(packed, running_mean=vectors[2], running_var=vectors[3])
    if joined:
        check_vectors(packed, weight=vectors[0], bias=vectors[1])


def given_statistics(
    packed: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, joined: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return the statistics to normalise with, None for those of the batch.

    Raises:
        ValueError: if the batch has one value for each channel, unless it is ``joined`` with others, or one of mean and
            variance is missing.
    """
    if (running_mean is None) is not (running_var is None):
        raise ValueError("running_mean and running_var belong together; give both or None for both")
    if not training and running_mean is not None and running_var is not None:
        return running_mean, running_var
    if _rows(packed) == 1 and not joined:
        raise ValueError(f"batch statistics need more than one value per channel, got packed {tuple(packed.shape)}")
    return None, None


def _rows(packed: Tensor) -> int:
    """Return how many values each channel has."""
    return packed.numel() // max(1, packed.shape[1])


def _update_running(
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float,
    packed: Tensor,
    backend: str,
) -> None:
    """Move the running statistics towards the batch's ``mean`` and biased ``var``, in place; no rows leave them.

    ``running`` is mean, variance and number of batches. An engine with norms of its own takes them all at once. The
    operators mark ``mean`` and ``var`` as not differentiable.
    """
    old_mean, old_var, batches = running
    if old_mean is not None and old_var is not None:
        if isinstance(count, Tensor):  # of all processes, on the device
            weight = momentum * (count > 1).to(old_mean.dtype)
            count = count.clamp(min=2)
            for old, new in ((old_mean, mean), (old_var, var * (count / (count - 1)))):
                old.lerp_(new.to(old.dtype), weight)
        elif count > 1:
            taker = choose(norm_call("batch_norm_act", packed, packed.shape[0]), backend)
            if taker in FUSED_NORMS and not is_traced() and old_mean.is_contiguous() and old_var.is_contiguous():
                engine(taker).move_running((old_mean, old_var, batches), mean, var, count, momentum)
                return
            new = mean.to(old_mean.dtype), (var * (count / (count - 1))).to(old_var.dtype)
            torch._foreach_lerp_([old_mean, old_var], new, momentum)  # pyright: ignore[reportPrivateImportUsage]
    if batches is not None:
        batches.add_(1)
