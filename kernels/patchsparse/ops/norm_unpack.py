"""Batch normalisation fused with ``unpack``: registered operators and public function.

What brings packed features back to whole images in masked image modelling: normalise over the active pixels, lay the
patches out, put a mask token elsewhere. The pure-PyTorch versions here are the specification and serve every device; on
a GPU the Triton engine implements them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from ..grid import PatchGrid
from ..layout import gather_patches, packed_empty, packed_like, scatter_patches
from ..packing import check_packed, fill_values
from .norm import column, given_statistics, normalised, update_running, used_statistics, uses_triton, wide

__all__ = ["patch_batch_norm_unpack"]


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
        weight, bias: ``(C,)`` or None.
        running_mean, running_var: ``(C,)`` float, updated in place if ``training``; None uses batch statistics always.
        fill: value of inactive patches: a number, or a ``(C,)`` tensor such as a learned mask token (differentiable).
            It is not normalised.
        training: use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: ``"auto"`` (Triton on a GPU), ``"triton"`` or ``"gather"`` (plain PyTorch).

    Returns:
        ``(B, C, Gh * ph, Gw * pw)`` in channels_last memory and the dtype of ``packed``. First derivatives only.

    Raises:
        ValueError: if N differs from ``grid.num_active``, ``fill`` is not a number or ``(C,)``, or there is one value
            per channel in training.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        z = F.batch_norm(packed, running_mean, running_var, weight, bias, training, momentum, eps)
        x = unpack(z, grid, fill)
    """
    check_packed(packed, grid)
    given = given_statistics(packed, running_mean, running_var, training)
    values = fill_values(fill, packed)
    maps = (grid.slot, grid.coords)
    image, mean, var = batch_norm_unpack(packed, values, weight, bias, *given, *maps, eps, backend)
    if training:
        update_running(packed, running_mean, running_var, mean, var, momentum)
    return image


@custom_op("patchsparse::batch_norm_unpack", mutates_args=())
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
    fast = uses_triton("batch_norm_unpack", x, slot.numel(), backend)
    used = used_statistics(x, mean, var, fast)
    statistics = (used[0], (used[1] + eps).rsqrt(), weight, bias)
    if fast:
        from ..backends.triton import norm_unpack as image

        return image.unpack_norm(x, fill, (slot, coords), statistics), *used
    z = normalised(x, None, *statistics)[1].to(x.dtype)
    return packed_like(scatter_patches(z, slot, coords, None if fill is None else fill.to(x.dtype))), *used


@batch_norm_unpack.register_fake
def _(x, fill, weight, bias, mean, var, slot, coords, eps, backend):
    height, width = x.shape[2] * slot.shape[1], x.shape[3] * slot.shape[2]
    statistics = (wide(x.new_empty(x.shape[1])) for _ in range(2))
    return packed_empty(x, slot.shape[0], x.shape[1], height, width), *statistics


@custom_op("patchsparse::batch_norm_unpack_grad", mutates_args=())
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
    rstd = (var + eps).rsqrt()
    if uses_triton("batch_norm_unpack", x, slot.numel(), backend):
        from ..backends.triton import norm_unpack as image

        gx, *sums = image.unpack_norm_grad(grad, x, (slot, coords), (mean, rstd, weight, None), batch)
        gw, gb, gf = (s.clone() for s in sums)  # an operator's outputs may not share memory
        return gx, gw, gb, gf
    u, _ = normalised(x, None, mean, rstd, None, None)
    d = wide(gather_patches(grad, slot, coords))
    gb, gw = d.sum((0, 2, 3)), (d * u).sum((0, 2, 3))
    count = max(1, x.numel() // x.shape[1])
    inner = d - (column(gb) + u * column(gw)) / count if batch else d
    gx = inner * column(rstd)
    gx = gx if weight is None else gx * column(weight)
    tiles = wide(grad).unflatten(2, (slot.shape[1], -1)).unflatten(4, (slot.shape[2], -1))  # (B, C, Gh, ph, Gw, pw)
    gf = torch.where(slot[:, None] < 0, tiles.sum((3, 5)), 0).sum((0, 2, 3))
    return packed_like(gx.to(x.dtype)), gw, gb, gf


@batch_norm_unpack_grad.register_fake
def _(grad, x, weight, mean, var, slot, coords, eps, batch, backend):
    return packed_empty(x, *x.shape), *(torch.empty_like(mean) for _ in range(3))


def _context(ctx, inputs, output):
    x, fill, weight, bias, mean, _, slot, coords, *ctx.options = inputs
    ctx.batch = mean is None
    ctx.fill, ctx.bias = (None if t is None else t.dtype for t in (fill, bias))
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, weight, output[1], output[2], slot, coords)


def _backward(ctx, grad, _mean, _var):
    x, weight, mean, var, slot, coords = ctx.saved_tensors
    eps, backend = ctx.options
    gx, gw, gb, gf = batch_norm_unpack_grad(grad, x, weight, mean, var, slot, coords, eps, ctx.batch, backend)
    gf = None if ctx.fill is None else gf.to(ctx.fill)
    gw = None if weight is None else gw.to(weight.dtype)
    gb = None if ctx.bias is None else gb.to(ctx.bias)
    return gx, gf, gw, gb, None, None, None, None, None, None


batch_norm_unpack.register_autograd(_backward, setup_context=_context)
