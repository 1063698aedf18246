"""The registered operators: schema, shape function, gradient; the engines only implement them.

``conv2d``, ``conv2d_dgrad`` and ``conv2d_wgrad`` are the three sides of one trilinear form, so each is the gradient of
the other two and derivatives of any order exist. This is the only file that touches ``torch.library``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import BOTH_GRADIENTS_AT_ONCE, choose, engine, requested
from ..backends.gather import halo as gather_halo
from ..backends.gather import halo_adjoint as gather_halo_adjoint
from ..geometry import Call, Stencil
from ..layout import gather_patches, packed_empty, packed_like, scatter_patches

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_wgrad", "halo", "halo_adjoint", "max_pool2d", "pack", "unpack"]

Ints = Sequence[int]


def _stencil(kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Stencil:
    return Stencil(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))  # pyright: ignore[reportArgumentType]


def _call(name: str, x: Tensor, size: Ints, stencil: Stencil, channels: tuple[int, int], groups: int = 1) -> Call:
    return Call(name, x.device.type, x.dtype, x.shape[0], (size[0], size[1]), *channels, stencil, groups)


def convolution_call(
    name: str, x: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Call:
    """Return the call of a convolution of packed ``x`` with ``weight``."""
    stencil = _stencil(weight.shape[2:], stride, padding, dilation)
    return _call(name, x, x.shape[2:], stencil, (x.shape[1], weight.shape[0]), groups)


# --- convolution -----------------------------------------------------------------------------------------------------


@custom_op("patchsparse::conv2d", mutates_args=())
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
    call = convolution_call("conv2d", x, weight, stride, padding, dilation, groups)
    if x.shape[0] == 0:
        return packed_empty(x, 0, weight.shape[0], *call.stencil.output_size(call.size))
    chosen = engine(choose(call, backend))
    return packed_like(chosen.conv2d(x, weight, bias, slot, coords, call.stencil, groups))


@conv2d.register_fake
def _(x, weight, bias, slot, coords, stride, padding, dilation, groups, backend):
    return packed_empty(x, x.shape[0], weight.shape[0], x.shape[2] // stride[0], x.shape[3] // stride[1])


@custom_op("patchsparse::conv2d_dgrad", mutates_args=())
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
    stencil = _stencil(weight.shape[2:], stride, padding, dilation)
    size = (grad.shape[2] * stride[0], grad.shape[3] * stride[1])
    in_channels = weight.shape[1] * groups
    if grad.shape[0] == 0:
        return packed_empty(grad, 0, in_channels, *size)
    call = _call("conv2d_dgrad", grad, size, stencil, (in_channels, weight.shape[0]), groups)
    chosen = engine(choose(call, backend))
    return packed_like(chosen.conv2d_dgrad(grad, weight, slot, coords, size, stencil, groups))


@conv2d_dgrad.register_fake
def _(grad, weight, slot, coords, stride, padding, dilation, groups, backend):
    height, width = grad.shape[2] * stride[0], grad.shape[3] * stride[1]
    return packed_empty(grad, grad.shape[0], weight.shape[1] * groups, height, width)


@custom_op("patchsparse::conv2d_wgrad", mutates_args=())
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
    stencil = _stencil(kernel, stride, padding, dilation)
    if x.shape[0] == 0:
        return torch.zeros_like(packed_empty(x, grad.shape[1], x.shape[1] // groups, *stencil.kernel))
    call = _call("conv2d_wgrad", x, x.shape[2:], stencil, (x.shape[1], grad.shape[1]), groups)
    chosen = engine(choose(call, backend))
    return packed_like(chosen.conv2d_wgrad(x, grad, slot, coords, stencil, groups))


@conv2d_wgrad.register_fake
def _(x, grad, slot, coords, kernel, stride, padding, dilation, groups, backend):
    return packed_empty(x, grad.shape[1], x.shape[1] // groups, kernel[0], kernel[1])


def _conv2d_context(ctx, inputs, output):
    x, weight, _, slot, coords, *ctx.options = inputs
    ctx.save_for_backward(x, weight, slot, coords)


def _conv2d_backward(ctx, grad):
    x, weight, slot, coords = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grid, kernel = (slot, coords), weight.shape[2:]
    if wants_x and wants_weight and requested(ctx.options[-1]) in BOTH_GRADIENTS_AT_ONCE:
        both = torch.ops.patchsparse.conv2d_gradients  # of ops_gradients.py, which builds on this file
        grad_x, grad_weight = both(grad, x, weight, *grid, *ctx.options)
    else:
        grad_x = conv2d_dgrad(grad, weight, *grid, *ctx.options) if wants_x else None
        grad_weight = conv2d_wgrad(x, grad, *grid, kernel, *ctx.options) if wants_weight else None
    grad_bias = grad.sum((0, 2, 3)) if wants_bias else None
    return grad_x, grad_weight, grad_bias, None, None, *(None for _ in ctx.options)


def _dgrad_context(ctx, inputs, output):
    grad, weight, slot, coords, *ctx.options = inputs
    ctx.save_for_backward(grad, weight, slot, coords)


def _dgrad_backward(ctx, x):
    grad, weight, slot, coords = ctx.saved_tensors
    wants_grad, wants_weight = ctx.needs_input_grad[:2]
    grid, kernel = (slot, coords), weight.shape[2:]
    grad_grad = conv2d(x, weight, None, *grid, *ctx.options) if wants_grad else None
    grad_weight = conv2d_wgrad(x, grad, *grid, kernel, *ctx.options) if wants_weight else None
    return grad_grad, grad_weight, None, None, *(None for _ in ctx.options)


def _wgrad_context(ctx, inputs, output):
    x, grad, slot, coords, _, *ctx.options = inputs
    ctx.save_for_backward(x, grad, slot, coords)


def _wgrad_backward(ctx, weight):
    x, grad, slot, coords = ctx.saved_tensors
    wants_x, wants_grad = ctx.needs_input_grad[:2]
    grad_x = conv2d_dgrad(grad, weight, slot, coords, *ctx.options) if wants_x else None
    grad_grad = conv2d(x, weight, None, slot, coords, *ctx.options) if wants_grad else None
    return grad_x, grad_grad, None, None, None, *(None for _ in ctx.options)


conv2d.register_autograd(_conv2d_backward, setup_context=_conv2d_context)
conv2d_dgrad.register_autograd(_dgrad_backward, setup_context=_dgrad_context)
conv2d_wgrad.register_autograd(_wgrad_backward, setup_context=_wgrad_context)


# --- max-pooling -----------------------------------------------------------------------------------------------------


@custom_op("patchsparse::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil of packed ``x`` and the winning tap (uint8)."""
    stencil = _stencil(kernel, stride, padding, dilation)
    if x.shape[0] == 0:
        pooled = packed_empty(x, 0, x.shape[1], *stencil.output_size((x.shape[2], x.shape[3])))
        return pooled, torch.empty_like(pooled, dtype=torch.uint8)
    call = _call("max_pool2d", x, x.shape[2:], stencil, (x.shape[1], x.shape[1]), x.shape[1])
    pooled, tap = engine(choose(call, backend)).max_pool2d(x, slot, coords, stencil)
    return packed_like(pooled), packed_like(tap)


@max_pool2d.register_fake
def _(x, slot, coords, kernel, stride, padding, dilation, backend):
    pooled = packed_empty(x, x.shape[0], x.shape[1], x.shape[2] // stride[0], x.shape[3] // stride[1])
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@custom_op("patchsparse::max_pool2d_grad", mutates_args=())
def max_pool2d_grad(
    grad: Tensor,
    tap: Tensor,
    slot: Tensor,
    coords: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    backend: str,
) -> Tensor:
    """Return the input gradient of :func:`max_pool2d`."""
    stencil = _stencil(kernel, stride, padding, dilation)
    size = (grad.shape[2] * stride[0], grad.shape[3] * stride[1])
    if grad.shape[0] == 0:
        return packed_empty(grad, 0, grad.shape[1], *size)
    call = _call("max_pool2d_grad", grad, size, stencil, (grad.shape[1], grad.shape[1]), grad.shape[1])
    chosen = engine(choose(call, backend))
    return packed_like(chosen.max_pool2d_grad(grad, tap, slot, coords, size, stencil))


@max_pool2d_grad.register_fake
def _(grad, tap, slot, coords, kernel, stride, padding, dilation, backend):
    return packed_empty(grad, grad.shape[0], grad.shape[1], grad.shape[2] * stride[0], grad.shape[3] * stride[1])


def _max_pool2d_context(ctx, inputs, output):
    _, slot, coords, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], slot, coords)


def _max_pool2d_backward(ctx, grad, _):
    grad_x = max_pool2d_grad(grad, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, *(None for _ in ctx.options)


max_pool2d.register_autograd(_max_pool2d_backward, setup_context=_max_pool2d_context)


# --- halo, pack, unpack: linear maps and their adjoints --------------------------------------------------------------


@custom_op("patchsparse::halo", mutates_args=())
def halo(x: Tensor, slot: Tensor, coords: Tensor, before: Ints, after: Ints) -> Tensor:
    """Return each patch with its halo; inactive neighbours and the outside read as 0."""
    tile = gather_halo(x, slot, coords, (before[0], before[1]), (after[0], after[1]))
    return packed_like(tile).clone() if tile is x else packed_like(tile)


@halo.register_fake
def _(x, slot, coords, before, after):
    height, width = x.shape[2] + before[0] + after[0], x.shape[3] + before[1] + after[1]
    return packed_empty(x, x.shape[0], x.shape[1], height, width)


@custom_op("patchsparse::halo_adjoint", mutates_args=())
def halo_adjoint(tile: Tensor, slot: Tensor, coords: Tensor, before: Ints, after: Ints) -> Tensor:
    """Return the sum of every halo pixel onto the packed pixel that it was read from."""
    size = (tile.shape[2] - before[0] - after[0], tile.shape[3] - before[1] - after[1])
    x = gather_halo_adjoint(tile, slot, coords, size, (before[0], before[1]), (after[0], after[1]))
    return packed_like(x).clone() if x is tile else packed_like(x)


@halo_adjoint.register_fake
def _(tile, slot, coords, before, after):
    height, width = tile.shape[2] - before[0] - after[0], tile.shape[3] - before[1] - after[1]
    return packed_empty(tile, tile.shape[0], tile.shape[1], height, width)


@custom_op("patchsparse::pack", mutates_args=())
def pack(image: Tensor, slot: Tensor, coords: Tensor) -> Tensor:
    """Return the active patches of ``image`` ``(B, C, H, W)``."""
    return packed_like(gather_patches(image, slot, coords))


@pack.register_fake
def _(image, slot, coords):
    height, width = image.shape[2] // slot.shape[1], image.shape[3] // slot.shape[2]
    return packed_empty(image, coords.shape[0], image.shape[1], height, width)


@custom_op("patchsparse::unpack", mutates_args=())
def unpack(packed: Tensor, fill: Tensor | None, slot: Tensor, coords: Tensor) -> Tensor:
    """Return the image with ``fill`` ``(C,)`` or 0 at inactive patches."""
    return packed_like(scatter_patches(packed, slot, coords, fill))


@unpack.register_fake
def _(packed, fill, slot, coords):
    height, width = packed.shape[2] * slot.shape[1], packed.shape[3] * slot.shape[2]
    return packed_empty(packed, slot.shape[0], packed.shape[1], height, width)


def _linear_context(ctx, inputs, output):
    _, *rest = inputs
    ctx.save_for_backward(*(i for i in rest if isinstance(i, Tensor)))
    ctx.rest = [i for i in rest if not isinstance(i, Tensor)]


def _halo_backward(ctx, grad):
    return halo_adjoint(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _halo_adjoint_backward(ctx, grad):
    return halo(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _pack_backward(ctx, grad):
    return unpack(grad, None, *ctx.saved_tensors), None, None


def _unpack_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _unpack_backward(ctx, grad):
    slot, coords = ctx.saved_tensors
    grad_packed = pack(grad, slot, coords) if ctx.needs_input_grad[0] else None
    grad_fill = None
    if ctx.needs_input_grad[1]:
        rows, columns = slot.shape[1:]
        tiles = grad.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))  # (B, C, Gh, ph, Gw, pw)
        per_patch = tiles.sum((3, 5))
        grad_fill = torch.where(slot[:, None] < 0, per_patch, 0).sum((0, 2, 3))
    return grad_packed, grad_fill, None, None


halo.register_autograd(_halo_backward, setup_context=_linear_context)
halo_adjoint.register_autograd(_halo_adjoint_backward, setup_context=_linear_context)
pack.register_autograd(_pack_backward, setup_context=_linear_context)
unpack.register_autograd(_unpack_backward, setup_context=_unpack_context)
