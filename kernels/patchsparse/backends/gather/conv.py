"""Convolution and its gradients in PyTorch, by one of two methods; see :func:`method`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import onednn
from ...geometry import Call, Stencil
from ...layout import dense_operand
from ...processor import lacks
from .. import tables
from .halo import Size, as_rows, from_rows, halo, patch_size, sum_bags

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_gradients", "conv2d_wgrad", "method", "method_of"]


def method(dtype: torch.dtype, size: Size, in_channels: int, out_channels: int, stencil: Stencil, groups: int) -> str:
    """Return ``"rows"`` or ``"halo"`` for patches of ``size`` pixels.

    Rows win on small patches with many channels, where a tile is mostly halo. Half precision takes tiles because
    summing the taps' products apart would round each of them.
    """
    if groups != 1 or stencil.local or dtype not in (torch.float32, torch.float64):
        return "halo"
    pixels = (size[0] // stencil.stride[0]) * (size[1] // stencil.stride[1])
    return "rows" if pixels <= 16 and min(in_channels, out_channels) >= 64 else "halo"


def method_of(call: Call) -> str:
    """Return the method that a convolution or a gradient of it takes."""
    size, stencil = call.size, call.stencil
    if call.operation == "conv2d_dgrad":
        size, stencil = stencil.output_size(size), _spread(stencil)
    return method(call.dtype, size, call.in_channels, call.out_channels, stencil, call.groups)


def _spread(stencil: Stencil) -> Stencil:
    """Return the stencil by whose reach the method of an input gradient is chosen: that of every tap, no stride."""
    return Stencil(stencil.kernel, padding=stencil.padding)


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype to compute ``x`` in: float32 for a half precision that a CPU lacks.

    PyTorch's own fallback rounds weight gradients after every tile there, and takes up to ten times as long.
    """
    return torch.float32 if x.device.type == "cpu" and lacks(x.dtype) else x.dtype


def _tap_matrices(weight: Tensor) -> Tensor:
    """View ``(C_out, C_in, kh, kw)`` as ``(taps, C_out, C_in)``; copies only if not channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1, 2).transpose(0, 1)


def _multiply_taps(values: Tensor, counts: list[int], matrices: Tensor) -> Tensor:
    """Return the rows of ``values``, grouped by tap, times each tap's matrix of ``matrices`` ``(taps, A, B)``."""
    products = values.new_empty(values.shape[0], matrices.shape[2])
    for rows, out, matrix in zip(values.split(counts), products.split(counts), matrices, strict=True):
        torch.mm(rows, matrix, out=out)
    return products


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    if (wide := _wide(x)) != x.dtype:
        bias = None if bias is None else bias.to(wide)
        return conv2d(x.to(wide), weight.to(wide), bias, slot, coords, stencil, groups).to(x.dtype)
    size = patch_size(x)
    if method(x.dtype, size, x.shape[1], weight.shape[0], stencil, groups) == "halo":
        tile = dense_operand(halo(x, slot, coords, stencil.before, stencil.after), stencil.stride, groups)
        return F.conv2d(tile, weight, bias, stencil.stride, 0, stencil.dilation, groups)
    pairs = tables.tap_pairs(slot, coords, size, stencil)
    matrices = _tap_matrices(weight).transpose(1, 2)
    products = _multiply_taps(as_rows(x).index_select(0, pairs.inputs), pairs.counts, matrices)
    rows = sum_bags(products, *pairs.by_output)
    if bias is not None:
        rows += bias
    return from_rows(rows, x.shape[0], stencil.output_size(size))


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``, itself a (transposed) convolution of ``grad``."""
    if (wide := _wide(grad)) != grad.dtype:
        return conv2d_dgrad(grad.to(wide), weight.to(wide), slot, coords, size, stencil, groups).to(grad.dtype)
    in_channels = weight.shape[1] * groups
    if method(grad.dtype, patch_size(grad), in_channels, weight.shape[0], _spread(stencil), groups) == "rows":
        pairs = tables.tap_pairs(slot, coords, size, stencil)
        rows = as_rows(grad).index_select(0, pairs.outputs)
        products = _multiply_taps(rows, pairs.counts, _tap_matrices(weight))
        return from_rows(sum_bags(products, *pairs.by_input), grad.shape[0], size)
    tile = dense_operand(halo(grad, slot, coords, stencil.before_grad, stencil.after_grad), stencil.stride, groups)
    if stencil.stride == (1, 1):
        flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        return F.conv2d(tile, flipped, None, 1, 0, stencil.dilation, groups)
    return _crop_transposed(tile, weight, size, stencil, groups)


def _crop_transposed(tile: Tensor, weight: Tensor, size: Size, stencil: Stencil, groups: int) -> Tensor:
    """Run a strided transposed convolution on tiles with halo and keep the pixels of the patch itself."""
    start, excess = [], []
    for axis in range(2):
        first = stencil.before_grad[axis] * stencil.stride[axis] + stencil.padding[axis]
        reach = stencil.dilation[axis] * (stencil.kernel[axis] - 1)
        full = (tile.shape[2 + axis] - 1) * stencil.stride[axis] + reach + 1
        start.append(first)
        excess.append(full - first - size[axis])
    crop = [max(0, min(s, e)) for s, e in zip(start, excess, strict=True)]
    extra = [max(0, -e) for e in excess]
    out = F.conv_transpose2d(tile, weight, None, stencil.stride, crop, extra, groups, stencil.dilation)
    top, left = (s - c for s, c in zip(start, crop, strict=True))
    return out[:, :, top : top + size[0], left : left + size[1]].contiguous(memory_format=torch.channels_last)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed over all active outputs."""
    if (wide := _wide(x)) != x.dtype:
        return conv2d_wgrad(x.to(wide), grad.to(wide), slot, coords, stencil, groups).to(x.dtype)
    shape = (grad.shape[1], x.shape[1] // groups, *stencil.kernel)
    if method(x.dtype, patch_size(x), x.shape[1], grad.shape[1], stencil, groups) == "rows":
        pairs = tables.tap_pairs(slot, coords, patch_size(x), stencil)
        inputs = as_rows(x).index_select(0, pairs.inputs).split(pairs.counts)
        grads = as_rows(grad).index_select(0, pairs.outputs).split(pairs.counts)
        weight = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
        for g, i, out in zip(grads, inputs, _tap_matrices(weight), strict=True):
            torch.mm(g.t(), i, out=out)
        return weight
    tile = dense_operand(halo(x, slot, coords, stencil.before, stencil.after), stencil.stride, groups)
    weight = x.new_empty(shape)
    options = (stencil.stride, (0, 0), stencil.dilation, groups)
    return onednn.conv2d_backward(grad, tile, weight, *options, (False, True))[1]


def conv2d_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients at ``x`` and ``weight``."""
    grad_x = conv2d_dgrad(grad, weight, slot, coords, patch_size(x), stencil, groups)
    return grad_x, conv2d_wgrad(x, grad, slot, coords, stencil, groups)
