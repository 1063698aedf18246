"""Convolution on the Triton engine: launches of ``conv_kernels.py``."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...eager import known
from ...geometry import Stencil
from ...layout import packed_like
from . import tuning
from .configs import Tile, capability, conv_tiles, programs_of, shared_memory, splits_of, wgrad_tiles
from .conv_kernels import (
    patch_conv2d_fwd_kernel,
    patch_conv2d_wgrad_kernel,
    sum_splits_kernel,
)
from .launch import Start, processors
from .row_tables import active_share, listed_rows, row_table, turned
from .tf32 import nearest, precision_of
from .tuned import Kind, card_of

__all__ = [
    "MOST_TAPS",
    "Operand",
    "Weights",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "forward_start",
    "forward_weights",
    "kind_of",
    "sum_start",
    "transposed_weights",
    "wgrad_starts",
]

Size = tuple[int, int]
MOST_TAPS = 62  # the taps of a tile are bits of an int64


class Operand(NamedTuple):
    """What the choice of configurations knows of the packed tensor ``(N, C, ph, pw)`` that is read.

    Attributes:
        shape: of the tensor.
        device: where it is.
        dtype: of its values.
        precision: of products, see :func:`precision_of`.
        patches: of the grid, visible or not.
    """

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    precision: str
    patches: int

    @classmethod
    def of(cls, x: Tensor, slot: Tensor) -> Operand:
        """Describe ``x`` on the grid of ``slot``."""
        return cls(x.shape, x.device, x.dtype, precision_of(x), slot.numel())

    @property
    def size(self) -> Size:
        """Pixels of a patch."""
        return self.shape[2], self.shape[3]

    @property
    def density(self) -> float:
        """Visible share of the patches."""
        return self.shape[0] / max(1, self.patches)

    @property
    def tensor_cores(self) -> bool:
        """Whether products run on them."""
        return self.dtype != torch.float32 or self.precision == "tf32"


def kind_of(name: str, x: Operand, stencil: Stencil, channels: Size, groups: int) -> Kind:
    """Return what tuned configurations are remembered by; density and rows in coarse steps."""
    rows, eighths = (x.shape[0] * x.shape[2] * x.shape[3]).bit_length(), round(x.density * 8)
    return Kind(name, card_of(x.device), x.dtype, x.precision, x.size, stencil, channels, groups, rows, eighths)


class Weights(NamedTuple):
    """Weights ``(C_out, kh, kw, C_in / groups)`` in memory, as a kernel reads them.

    Attributes:
        channels: per group, those summed over and those written.
        groups: of the convolution.
        strides: of a group, of the first tap (an offset), of a written channel, of a tap, of a channel summed over.
    """

    channels: Size
    groups: int
    strides: tuple[int, int, int, int, int]


def forward_weights(shape: tuple[int, ...], groups: int) -> Weights:
    """Return how weights of ``shape`` ``(C_out, C_in / groups, kh, kw)`` are read for a convolution."""
    c_out, c_in, number = shape[0] // groups, shape[1], shape[2] * shape[3]
    return Weights((c_in, c_out), groups, (c_out * number * c_in, 0, number * c_in, c_in, 1))


def transposed_weights(shape: tuple[int, ...], groups: int, turned_round: bool) -> Weights:
    """Return how they are read for the input gradient, the last tap first if so wanted."""
    c_out, c_in, number = shape[0] // groups, shape[1], shape[2] * shape[3]
    first, tap = ((number - 1) * c_in, -c_in) if turned_round else (0, c_in)
    return Weights((c_out, c_in), groups, (c_out * number * c_in, first, 1, tap, number * c_in))


class _WgradPlan(NamedTuple):
    """What is the same in all weight gradients of the same shapes, types, device and options.

    Attributes:
        kind: of call, by which a configuration is chosen.
        tiles: that it is chosen from.
        shape: of the result; in channels_last memory.
        strides: of the result.
        starts: by configuration, those that were met.
    """

    kind: Kind
    tiles: tuple[Tile, ...]
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    starts: dict[Tile, WgradStarts]


class _ForwardPlan(NamedTuple):
    """The same of convolutions, or of their input gradients.

    Attributes:
        kind, tiles, shape, strides, starts: as above.
        stencil: of the row table.
        transposed: whether the table is that of the input gradient at a stride.
        weights: how they are read.
    """

    kind: Kind
    tiles: tuple[Tile, ...]
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    starts: dict[Tile, Start]
    stencil: Stencil
    transposed: bool
    weights: Weights


def _last(channels: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the strides of channels_last memory."""
    return height * width * channels, 1, width * channels, channels


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    return _run_forward("conv2d", x, weight, bias, slot, coords, (x.shape[2], x.shape[3]), stencil, groups)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``.

    At stride 1 this is the forward kernel with the weights read in the other direction; else each input pixel asks
    the outputs that read it. No atomics.
    """
    return _run_forward("conv2d_dgrad", grad, weight, None, slot, coords, size, stencil, groups)


def _run_forward(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    size: Size,
    stencil: Stencil,
    groups: int,
) -> Tensor:
    """Choose a configuration and run; ``size`` is that of the input of the convolution, also in its gradient."""
    x, weight = packed_like(x), nearest(packed_like(weight))
    bias = None if bias is None else bias.contiguous()
    types = (weight.dtype, None if bias is None else bias.dtype)
    plan = _forward_plan(name, Operand.of(x, slot), weight.shape, types, size, stencil, groups)

    def run(tile: Tile) -> Tensor:
        start = plan.starts.get(tile)
        if start is None:
            count = plan.shape[0] * plan.shape[2] * plan.shape[3]
            start = plan.starts[tile] = forward_start(count, plan.weights, stencil.taps, plan.kind.precision, tile)
        y = x.new_empty_strided(plan.shape, plan.strides)
        start(x, weight, bias, y, *row_table(slot, coords, size, plan.stencil, plan.transposed, tile.sorted))
        return y

    return tuning.best(plan.kind, plan.tiles, run)


@known
def _forward_plan(
    name: str,
    x: Operand,
    weight: tuple[int, ...],
    types: tuple[torch.dtype | None, ...],
    size: Size,
    stencil: Stencil,
    groups: int,
) -> _ForwardPlan:
    """Return the plan of a convolution or of its input gradient; ``types`` are the weight's and the bias's."""
    straight, transposed = stencil.stride == (1, 1), False
    if name == "conv2d":
        weights, target = forward_weights(weight, groups), stencil.output_size(size)
    else:
        weights, target, transposed = transposed_weights(weight, groups, straight), size, not straight
        stencil = turned(stencil) if straight else stencil
    count, share = x.shape[0] * target[0] * target[1], active_share(size, stencil, x.density)
    shared = shared_memory(x.device)
    tiles = conv_tiles(count, *weights.channels, x.dtype.itemsize, x.tensor_cores, share, shared, capability(x.device))
    kind, channels = kind_of(name, x, stencil, weights.channels, groups), groups * weights.channels[1]
    shape, strides = (x.shape[0], channels, *target), _last(channels, *target)
    return _ForwardPlan(kind, tiles, shape, strides, {}, stencil, transposed, weights)


def forward_start(rows: int, weights: Weights, taps: int, precision: str, tile: Tile) -> Start:
    """Return the start that computes ``rows`` of a result.

    Tensors: x ``(N, ph, pw, C)`` and weights ``(C_out, kh, kw, C_in / groups)`` in memory, bias, y, then those of
    :func:`row_table`.
    """
    c_in, c_out = weights.channels
    programs = ceil(rows / tile.m) * ceil(c_out / tile.n)
    constants = {"C_IN": c_in, "C_OUT": c_out, "GROUPS": weights.groups, "TAPS": taps, "W": weights.strides}
    constants |= {"PRECISION": precision, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return Start(patch_conv2d_fwd_kernel, (programs, weights.groups), (rows,), constants, tile.warps, tile.stages)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed in an order that never changes."""
    x, grad = packed_like(x), nearest(packed_like(grad))
    described = Operand.of(x, slot)
    plan = _wgrad_plan(described, grad.shape, grad.dtype, stencil, groups)

    def run(tile: Tile) -> Tensor:
        starts = plan.starts.get(tile)
        if starts is None:
            starts = plan.starts[tile] = wgrad_starts(described, grad.shape, stencil, groups, tile)
        weight = x.new_empty_strided(plan.shape, plan.strides)
        splits, partial, total = starts
        parts = weight if splits == 1 else x.new_empty((splits, weight.numel()), dtype=torch.float32)
        if tile.sorted:
            partial(x, grad, parts, *listed_rows(slot, coords, plan.kind.size, stencil, tile.taps))
        else:
            partial(x, grad, parts, row_table(slot, coords, plan.kind.size, stencil).sources, None, None)
        if splits > 1:
            total(parts, weight)
        return weight

    return tuning.best(plan.kind, plan.tiles, run)


@known
def _wgrad_plan(x: Operand, grad: tuple[int, ...], dtype: torch.dtype, stencil: Stencil, groups: int) -> _WgradPlan:
    """Return the plan of the weight gradient; ``grad`` is the shape of the output's gradient, ``dtype`` its type."""
    channels = (x.shape[1] // groups, grad[1] // groups)
    share, shared = active_share(x.size, stencil, x.density), shared_memory(x.device)
    options = (x.dtype.itemsize, x.tensor_cores, share, shared, capability(x.device))
    tiles = wgrad_tiles(*channels, stencil.taps, *options)
    kind = kind_of("conv2d_wgrad", x, stencil, channels, groups)
    shape, strides = (grad[1], channels[0], *stencil.kernel), _last(channels[0], *stencil.kernel)
    return _WgradPlan(kind, tiles, shape, strides, {})


class WgradStarts(NamedTuple):
    """The kernels of the weight gradient: of ``splits`` shares of the rows, and their sum, if there are several."""

    splits: int
    partial: Start
    total: Start


def wgrad_starts(
    x: Operand, grad: tuple[int, ...], stencil: Stencil, groups: int, tile: Tile, splits: int | None = None
) -> WgradStarts:
    """Return the starts of the weight gradient from x and from the output's gradient of shape ``grad``.

    Tensors: x, the gradient, parts ``(splits, values)`` float32, or the weight's gradient itself if there is one, then
    a table without its order, or :func:`listed_rows`; those of :func:`sum_start`. ``splits`` is how many parts there
    are; by default what fills the device.
    """
    patches, channels, height, width = grad
    c_in, c_out, rows = x.shape[1] // groups, channels // groups, patches * height * width
    programs = stencil.taps // tile.taps * ceil(c_out / tile.m) * ceil(c_in / tile.n)
    weights = channels * c_in * stencil.taps
    if splits is None:
        splits = _splits(x, rows, programs * groups, rows * channels, weights, tile)
    constants = {"C_IN": c_in, "C_OUT": c_out, "GROUPS": groups, "TAPS": stencil.taps, "TOGETHER": tile.taps}
    constants |= {"PRECISION": x.precision, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    grid, numbers = (programs * splits, groups), (rows, splits)
    partial = Start(patch_conv2d_wgrad_kernel, grid, numbers, constants, tile.warps, tile.stages)
    return WgradStarts(splits, partial, sum_start(splits, weights))


def _splits(x: Operand, rows: int, programs: int, values: int, weights: int, tile: Tile) -> int:
    """Return into how many parts rows are split: no part is under four steps, all together no more than operands.

    The output's gradient has ``values``; a part has ``weights`` of four bytes.
    """
    itemsize = x.dtype.itemsize
    read = (x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3] + values) * itemsize
    slots = processors(x.device) * programs_of(tile, itemsize, shared_memory(x.device))
    return splits_of(programs, slots, max(1, min(rows // (4 * tile.k), read // max(1, 4 * weights))))


def sum_start(splits: int, values: int) -> Start:
    """Return the start that sums parts ``(splits, values)`` float32; tensors: parts, and the sum."""
    at_once = min(32, 1 << (splits - 1).bit_length())
    block = 4096 // at_once
    constants = {"BLOCK": block, "AT_ONCE": at_once}
    return Start(sum_splits_kernel, (ceil(values / block),), (values, splits), constants, 8)
