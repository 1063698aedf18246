"""The ``gather`` engine: pure PyTorch, any device and dtype; the readable definition of every operation.

Two methods, chosen by :func:`method` from measurement (``benchmarks/test_conv.py``):

- *halo*: gather each patch with its halo into a tile, then run PyTorch's own dense operation on the tiles.
- *rows*: for each kernel tap gather the rows whose neighbour is active, multiply them by the tap's weights, and sum
  the products of each output. Inactive neighbours cost nothing; deep stages go beyond 1 / (visible share).

Every scatter is written as a gather through inverse rows: sums are deterministic and faster than ``index_add``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Call, Stencil
from ..layout import dense_operand
from ..processor import lacks
from . import tables

__all__ = [
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "halo",
    "halo_adjoint",
    "max_pool2d",
    "max_pool2d_grad",
    "method",
    "why_not",
]

Size = tuple[int, int]


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take the call: never."""
    return None


def method(x: Tensor, in_channels: int, out_channels: int, stencil: Stencil, groups: int) -> str:
    """Return ``"rows"`` or ``"halo"`` for a packed tensor ``x`` (forward input, or its gradient's shape).

    Rows win on small patches with many channels, where a tile is mostly halo. Half precision takes tiles because
    summing the taps' products apart would round each of them.
    """
    if groups != 1 or stencil.local or x.dtype not in (torch.float32, torch.float64):
        return "halo"
    pixels = (x.shape[2] // stencil.stride[0]) * (x.shape[3] // stencil.stride[1])
    return "rows" if pixels <= 16 and min(in_channels, out_channels) >= 64 else "halo"


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype to compute ``x`` in: float32 for a half precision that a CPU lacks.

    PyTorch's own fallback rounds weight gradients after every tile there, and takes up to ten times as long.
    """
    return torch.float32 if x.device.type == "cpu" and lacks(x.dtype) else x.dtype


def _as_rows(x: Tensor) -> Tensor:
    """View ``(N, C, ph, pw)`` as the matrix ``(N * ph * pw, C)``; copies only if not channels_last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])


def _from_rows(rows: Tensor, count: int, size: Size) -> Tensor:
    """View the matrix ``(N * ph * pw, C)`` as ``(N, C, ph, pw)`` in channels_last memory."""
    return rows.view(count, size[0], size[1], rows.shape[1]).permute(0, 3, 1, 2)


def _patch_size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]


def halo(x: Tensor, slot: Tensor, coords: Tensor, before: Size, after: Size, outside: float = 0.0) -> Tensor:
    """Return ``(N, C, before + ph + after, before + pw + after)``: each patch with its halo.

    Pixels of inactive patches read as 0, pixels beyond the image as ``outside``.
    """
    if before == after == (0, 0):
        return x
    matrix = _as_rows(x)
    rows = tables.halo_rows(slot, coords, _patch_size(x), before, after)
    fills = (matrix.new_full((1, matrix.shape[1]), value) for value in (0.0, outside))
    source = torch.cat((matrix, *fills))  # row -1 (inactive) is the first fill, row -2 (outside) the second
    at = torch.where(rows >= 0, rows, matrix.shape[0] - 1 - rows).flatten()
    return _from_rows(source.index_select(0, at), x.shape[0], (rows.shape[1], rows.shape[2]))


def _sum_bags(values: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """Return for each bag the sum of ``values[members]``; the sum over no members is 0."""
    if values.shape[0] == 0:
        return values.new_zeros(offsets.shape[0], values.shape[1])
    return torch.embedding_bag(values, members, offsets, False, 0)[0]


def halo_adjoint(tile: Tensor, slot: Tensor, coords: Tensor, size: Size, before: Size, after: Size) -> Tensor:
    """Return ``(N, C, ph, pw)``: the sum of every halo pixel onto the packed pixel that it was read from."""
    if before == after == (0, 0):
        return tile
    bags = tables.adjoint_bags(slot, coords, size, before, after)
    return _from_rows(_sum_bags(_as_rows(tile), *bags), tile.shape[0], size)


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
    size = _patch_size(x)
    if method(x, x.shape[1], weight.shape[0], stencil, groups) == "halo":
        tile = dense_operand(halo(x, slot, coords, stencil.before, stencil.after))
        return F.conv2d(tile, weight, bias, stencil.stride, 0, stencil.dilation, groups)
    pairs = tables.tap_pairs(slot, coords, size, stencil)
    matrices = _tap_matrices(weight).transpose(1, 2)
    products = _multiply_taps(_as_rows(x).index_select(0, pairs.inputs), pairs.counts, matrices)
    rows = _sum_bags(products, *pairs.by_output)
    if bias is not None:
        rows += bias
    return _from_rows(rows, x.shape[0], stencil.output_size(size))


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``, itself a (transposed) convolution of ``grad``."""
    if (wide := _wide(grad)) != grad.dtype:
        return conv2d_dgrad(grad.to(wide), weight.to(wide), slot, coords, size, stencil, groups).to(grad.dtype)
    in_channels = weight.shape[1] * groups
    if method(grad, in_channels, weight.shape[0], Stencil(stencil.kernel, padding=stencil.padding), groups) == "rows":
        pairs = tables.tap_pairs(slot, coords, size, stencil)
        rows = _as_rows(grad).index_select(0, pairs.outputs)
        products = _multiply_taps(rows, pairs.counts, _tap_matrices(weight))
        return _from_rows(_sum_bags(products, *pairs.by_input), grad.shape[0], size)
    tile = dense_operand(halo(grad, slot, coords, stencil.before_grad, stencil.after_grad))
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
    if method(x, x.shape[1], grad.shape[1], stencil, groups) == "rows":
        pairs = tables.tap_pairs(slot, coords, _patch_size(x), stencil)
        inputs = _as_rows(x).index_select(0, pairs.inputs).split(pairs.counts)
        grads = _as_rows(grad).index_select(0, pairs.outputs).split(pairs.counts)
        weight = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
        for g, i, out in zip(grads, inputs, _tap_matrices(weight), strict=True):
            torch.mm(g.t(), i, out=out)
        return weight
    tile = dense_operand(halo(x, slot, coords, stencil.before, stencil.after))
    weight = x.new_empty(shape)
    return torch.ops.aten.convolution_backward(
        grad,
        tile,
        weight,
        None,
        stencil.stride,
        [0, 0],
        stencil.dilation,
        False,
        [0, 0],
        groups,
        [False, True, False],
    )[1]


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil and the winning tap (uint8, row-major in the kernel).

    An inactive neighbour counts as 0 and the image border as -inf, as pooling a zero-filled dense image does.
    Of equal values the first in row-major order wins, as in ``F.max_pool2d``.
    """
    tile = halo(x, slot, coords, stencil.before, stencil.after, outside=-torch.inf)
    pooled, at = F.max_pool2d(tile, stencil.kernel, stencil.stride, 0, stencil.dilation, return_indices=True)
    top, left = _stencil_origins(tile, pooled, stencil)
    row, column = at // tile.shape[3] - top, at % tile.shape[3] - left
    tap = row // stencil.dilation[0] * stencil.kernel[1] + column // stencil.dilation[1]
    return pooled, tap.to(torch.uint8)


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return the gradient at the input ``(N, C, ph, pw)``: each output's gradient goes to its winning tap."""
    tile_size = [s + b + a for s, b, a in zip(size, stencil.before, stencil.after, strict=True)]
    tile = grad.new_empty(grad.shape[0], grad.shape[1], *tile_size).contiguous(memory_format=torch.channels_last)
    top, left = _stencil_origins(tile, grad, stencil)
    row = top + tap.long() // stencil.kernel[1] * stencil.dilation[0]
    column = left + tap.long() % stencil.kernel[1] * stencil.dilation[1]
    at = row * tile.shape[3] + column
    tile_grad = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, tile, stencil.kernel, stencil.stride, [0, 0], stencil.dilation, False, at
    )
    return halo_adjoint(tile_grad, slot, coords, size, stencil.before, stencil.after)


def _stencil_origins(tile: Tensor, pooled: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the tile row ``(oh, 1)`` and column ``(ow,)`` of the first tap of each stencil."""
    top = torch.arange(pooled.shape[2], device=tile.device)[:, None] * stencil.stride[0]
    left = torch.arange(pooled.shape[3], device=tile.device) * stencil.stride[1]
    return top, left
