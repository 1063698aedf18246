"""Convolution on the Triton engine: launches of ``conv_kernels.py``."""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Stencil
from . import tuning
from .configs import Tile, conv_tiles, programs_of, shared_memory, splits_of, wgrad_tiles
from .conv_kernels import (
    patch_conv2d_fwd_kernel,
    patch_conv2d_wgrad_kernel,
    round_to_tf32_kernel,
    sum_splits_kernel,
)
from .launch import Launch, as_rows, processors, rows_like
from .row_tables import active_share, listed_rows, row_table, turned
from .tuned import Kind, card_of

__all__ = [
    "MOST_TAPS",
    "Weights",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "forward_launch",
    "forward_weights",
    "kind_of",
    "nearest",
    "precision_of",
    "rounding_launch",
    "sum_launch",
    "transposed_weights",
    "wgrad_launches",
]

Size = tuple[int, int]
MOST_TAPS = 62  # the taps of a tile are bits of an int64


def precision_of(x: Tensor) -> str:
    """Return ``"tf32"`` if PyTorch allows it for convolutions of float32, else ``"ieee"``; as cuDNN does."""
    if x.device.type == "cpu":
        return "widened" if x.dtype == torch.bfloat16 else "ieee"
    if x.dtype != torch.float32:
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    allowed = torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def nearest(x: Tensor) -> Tensor:
    """Return ``x`` as tensor cores should read it: in float32 rounded to the 10 bits of mantissa that TF32 has.

    They cut off the other bits, which makes every product smaller: by 7e-4 on average if both operands are cut, as
    measured on an H100, and twice as far off as cuDNN, which rounds. One operand of each product is rounded here: the
    weight, and in its own gradient that of the output.
    """
    if precision_of(x) != "tf32":
        return x
    y = torch.empty_like(x)
    rounding_launch(x, y).run()
    return y


def rounding_launch(x: Tensor, y: Tensor) -> Launch:
    """Return the launch that fills ``y`` from contiguous ``x``, both float32."""
    return Launch(round_to_tf32_kernel, (ceil(x.numel() / 1024),), (x, y, x.numel()), {"BLOCK": 1024}, 4, 1)


def _density(slot: Tensor, coords: Tensor) -> float:
    return coords.shape[0] / max(1, slot.numel())


def kind_of(name: str, x: Tensor, size: Size, stencil: Stencil, channels: Size, groups: int, density: float) -> Kind:
    """Return what tuned configurations are remembered by; density and rows in coarse steps."""
    rows = (x.shape[0] * x.shape[2] * x.shape[3]).bit_length()
    card, eighths = card_of(x.device), round(density * 8)
    return Kind(name, card, x.dtype, precision_of(x), size, stencil, channels, groups, rows, eighths)


class Weights(NamedTuple):
    """Weights as a kernel reads them.

    Attributes:
        taps: ``(C_out, kh, kw, C_in / groups)``.
        channels: per group, those summed over and those written.
        groups: of the convolution.
        strides: of a group, of the first tap (an offset), of a written channel, of a tap, of a channel summed over.
    """

    taps: Tensor
    channels: Size
    groups: int
    strides: tuple[int, int, int, int, int]


def forward_weights(weight: Tensor, groups: int) -> Weights:
    """Return ``weight`` ``(C_out, C_in / groups, kh, kw)`` for a convolution."""
    taps = nearest(as_rows(weight))
    c_out, c_in, number = taps.shape[0] // groups, taps.shape[3], taps.shape[1] * taps.shape[2]
    return Weights(taps, (c_in, c_out), groups, (c_out * number * c_in, 0, number * c_in, c_in, 1))


def transposed_weights(weight: Tensor, groups: int, turned_round: bool) -> Weights:
    """Return ``weight`` ``(C_out, C_in / groups, kh, kw)`` for the input gradient, the last tap first if so wanted."""
    taps = nearest(as_rows(weight))
    c_out, c_in, number = taps.shape[0] // groups, taps.shape[3], taps.shape[1] * taps.shape[2]
    first, tap = ((number - 1) * c_in, -c_in) if turned_round else (0, c_in)
    return Weights(taps, (c_out, c_in), groups, (c_out * number * c_in, first, 1, tap, number * c_in))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    weights, size = forward_weights(weight, groups), (x.shape[2], x.shape[3])
    return _run_forward("conv2d", x, weights, bias, slot, coords, size, stencil, False)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``.

    At stride 1 this is the forward kernel with the weights read in the other direction; else each input pixel asks
    the outputs that read it. No atomics.
    """
    straight = stencil.stride == (1, 1)
    weights = transposed_weights(weight, groups, turned_round=straight)
    stencil = turned(stencil) if straight else stencil
    return _run_forward("conv2d_dgrad", grad, weights, None, slot, coords, size, stencil, not straight)


def _run_forward(
    name: str,
    x: Tensor,
    weights: Weights,
    bias: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    size: Size,
    stencil: Stencil,
    transposed: bool,
) -> Tensor:
    """Choose a configuration and run; ``size`` and ``stencil`` are those of the row table."""
    density, precision = _density(slot, coords), precision_of(x)
    target = size if transposed else stencil.output_size(size)
    tensor_cores = x.dtype != torch.float32 or precision == "tf32"
    count, share = x.shape[0] * target[0] * target[1], active_share(size, stencil, density)
    tiles = conv_tiles(count, *weights.channels, x.element_size(), tensor_cores, share, shared_memory(x.device))
    rows = as_rows(x)
    bias = None if bias is None else bias.contiguous()

    def run(tile: Tile) -> Tensor:
        y = rows_like(x, x.shape[0], target, weights.groups * weights.channels[1])
        forward_launch(rows, weights, bias, y, slot, coords, size, stencil, transposed, tile).run()
        return y

    source = (x.shape[2], x.shape[3])
    return tuning.best(kind_of(name, x, source, stencil, weights.channels, weights.groups, density), tiles, run)


def forward_launch(
    rows: Tensor,
    weights: Weights,
    bias: Tensor | None,
    y: Tensor,
    slot: Tensor,
    coords: Tensor,
    size: Size,
    stencil: Stencil,
    transposed: bool,
    tile: Tile,
) -> Launch:
    """Return the launch that fills ``y`` ``(N, C, ph, pw)`` from ``rows`` ``(N, ph, pw, C)``; see :func:`row_table`."""
    table = row_table(slot, coords, size, stencil, transposed, tile.sorted)
    count, (c_in, c_out) = y.shape[0] * y.shape[2] * y.shape[3], weights.channels
    return Launch(
        patch_conv2d_fwd_kernel,
        (ceil(count / tile.m) * ceil(c_out / tile.n), weights.groups),
        (rows, weights.taps, bias, y, *table, count),
        {"C_IN": c_in, "C_OUT": c_out, "GROUPS": weights.groups, "TAPS": stencil.taps, "W": weights.strides}
        | {"PRECISION": precision_of(rows), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
        tile.warps,
        tile.stages,
    )


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed in an order that never changes."""
    size, density = (x.shape[2], x.shape[3]), _density(slot, coords)
    channels = (x.shape[1] // groups, grad.shape[1] // groups)
    tensor_cores = x.dtype != torch.float32 or precision_of(x) == "tf32"
    share, shared = active_share(size, stencil, density), shared_memory(x.device)
    tiles = wgrad_tiles(*channels, stencil.taps, x.element_size(), tensor_cores, share, shared)
    operands = (as_rows(x), nearest(as_rows(grad)))

    def run(tile: Tile) -> Tensor:
        weight = rows_like(x, grad.shape[1], stencil.kernel, channels[0])
        for launch in wgrad_launches(*operands, weight, slot, coords, stencil, groups, tile):
            launch.run()
        return weight

    return tuning.best(kind_of("conv2d_wgrad", x, size, stencil, channels, groups, density), tiles, run)


@lru_cache(maxsize=4096)
def _splits(
    device: torch.device, itemsize: int, rows: int, programs: int, values: int, weights: int, tile: Tile
) -> int:
    """Return into how many parts rows are split: no part is under four steps, all together no more than operands.

    These have ``values`` of ``itemsize`` bytes; a part has ``weights`` of four bytes.
    """
    slots = processors(device) * programs_of(tile, itemsize, shared_memory(device))
    return splits_of(programs, slots, max(1, min(rows // (4 * tile.k), values * itemsize // max(1, 4 * weights))))


def wgrad_launches(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    slot: Tensor,
    coords: Tensor,
    stencil: Stencil,
    groups: int,
    tile: Tile,
    splits: int | None = None,
) -> list[Launch]:
    """Return the launches that fill ``weight`` from ``x`` and ``grad``, both ``(N, ph, pw, C)``.

    One part is written into ``weight`` itself. ``splits`` is how many there are; by default what fills the device.
    """
    patches, height, width, channels = grad.shape
    size, c_in, c_out, count = (
        (x.shape[1], x.shape[2]),
        x.shape[3] // groups,
        channels // groups,
        patches * height * width,
    )
    programs = stencil.taps // tile.taps * ceil(c_out / tile.m) * ceil(c_in / tile.n)
    if splits is None:
        values = x.numel() + grad.numel()
        splits = _splits(x.device, x.element_size(), count, programs * groups, values, weight.numel(), tile)
    parts = weight if splits == 1 else x.new_empty(splits, weight.numel(), dtype=torch.float32)
    if tile.sorted:
        rows = listed_rows(slot, coords, size, stencil, tile.taps)
    else:
        rows = (row_table(slot, coords, size, stencil).sources, None, None)
    partial = Launch(
        patch_conv2d_wgrad_kernel,
        (programs * splits, groups),
        (x, grad, parts, *rows, count, splits),
        {"C_IN": c_in, "C_OUT": c_out, "GROUPS": groups, "TAPS": stencil.taps, "TOGETHER": tile.taps}
        | {"PRECISION": precision_of(x), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
        tile.warps,
        tile.stages,
    )
    return [partial] if splits == 1 else [partial, sum_launch(parts, weight)]


def sum_launch(parts: Tensor, weight: Tensor) -> Launch:
    """Return the launch that sums ``parts`` ``(splits, weight.numel())`` into ``weight``."""
    at_once = min(32, 1 << (parts.shape[0] - 1).bit_length())
    block = 4096 // at_once
    arguments = (parts, weight, weight.numel(), parts.shape[0])
    constants = {"BLOCK": block, "AT_ONCE": at_once}
    return Launch(sum_splits_kernel, (ceil(weight.numel() / block),), arguments, constants, 8, 1)
