"""Packing and unpacking: schema, shape function and gradient of the registered operators; each undoes the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import gather_patches, packed_empty, packed_output, scatter_patches
from .operands import check_fill, check_image, check_packed
from .operator import operator

__all__ = ["pack", "unpack"]


@operator("patchsparse::pack")
def pack(image: Tensor, slot: Tensor, coords: Tensor) -> Tensor:
    """Return the active patches of ``image`` ``(B, C, H, W)``."""
    check_image(image, slot, coords)
    return packed_output(gather_patches(image, slot, coords))


@pack.shape
def _(image, slot, coords):
    height, width = image.shape[2] // slot.shape[1], image.shape[3] // slot.shape[2]
    return packed_empty(image, coords.shape[0], image.shape[1], height, width)


@operator("patchsparse::unpack")
def unpack(packed: Tensor, fill: Tensor | None, slot: Tensor, coords: Tensor) -> Tensor:
    """Return the image with ``fill`` ``(C,)`` or 0 at inactive patches."""
    check_packed(packed, slot, coords)
    check_fill(packed, fill)
    return packed_output(scatter_patches(packed, slot, coords, fill))


@unpack.shape
def _(packed, fill, slot, coords):
    height, width = packed.shape[2] * slot.shape[1], packed.shape[3] * slot.shape[2]
    return packed_empty(packed, slot.shape[0], packed.shape[1], height, width)


def _pack_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


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


pack.differentiable(_pack_context, _pack_backward)
unpack.differentiable(_unpack_context, _unpack_backward)
