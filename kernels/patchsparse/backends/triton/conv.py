"""Convolution on the Triton engine: launches of ``conv_kernels.py``."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from ...geometry import Stencil
from . import tuning
from .configs import Tile, conv_tiles, wgrad_tiles
from .conv_kernels import patch_conv2d_fwd_kernel, patch_conv2d_wgrad_kernel, sum_splits_kernel
from .launch import Launch, as_rows, processors, row_major, rows_like, takes_large_tiles
from .row_tables import active_share, listed_rows, row_table, turned
from .tuned import Kind, card_of

__all__ = ["MOST_TAPS", "axes", "conv2d", "conv2d_dgrad", "conv2d_wgrad", "forward_launch", "wgrad_launches"]

Size = tuple[int, int]
MOST_TAPS = 62  # the taps of a tile are bits of an int64


@lru_cache(maxsize=4096)
def axes(source: Size, target: Size, stencil: Stencil) -> dict[str, tuple[int, ...]]:
    """Return the constants V and H of a kernel that reads patches of ``source`` and writes ``target`` pixels."""
    parts = zip(source, target, stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, strict=True)
    return dict(zip("VH", parts, strict=True))


def precision_of(x: Tensor) -> str:
    """Return ``"tf32"`` if PyTorch allows it for convolutions of float32, else ``"ieee"``; as cuDNN does."""
    if x.device.type == "cpu":
        return "widened" if x.dtype == torch.bfloat16 else "ieee"
    if x.dtype != torch.float32:
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    allowed = torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _density(slot: Tensor, coords: Tensor) -> float:
    return coords.shape[0] / max(1, slot.numel())


def _key(name: str, x: Tensor, size: Size, stencil: Stencil, channels: Size, groups: int, density: float) -> Kind:
    """Return what tuned configurations are remembered by; density and rows in coarse steps."""
    rows = (x.shape[0] * x.shape[2] * x.shape[3]).bit_length()
    card, eighths = card_of(x.device), round(density * 8)
    return Kind(name, card, x.dtype, precision_of(x), size, stencil, channels, groups, rows, eighths)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    taps = as_rows(weight)
    c_out, c_in = taps.shape[0] // groups, taps.shape[3]
    strides = {"w_out": stencil.taps * c_in, "w_tap": c_in, "w_in": 1, "w_first": 0}
    return _run_forward("conv2d", x, taps, bias, slot, coords, stencil, groups, (c_in, c_out), strides)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the gradient at the input ``(N, C_in, ph, pw)``.

    At stride 1 this is the forward kernel with the weights read in the other direction; else each input pixel asks
    the outputs that read it. No atomics.
    """
    taps = as_rows(weight)
    c_out, c_in = taps.shape[0] // groups, taps.shape[3]
    strides = {"w_out": 1, "w_tap": c_in, "w_in": stencil.taps * c_in, "w_first": 0}
    if stencil.stride != (1, 1):
        options = (slot, coords, stencil, groups, (c_out, c_in), strides, size)
        return _run_forward("conv2d_dgrad", grad, taps, None, *options)
    strides |= {"w_tap": -c_in, "w_first": (stencil.taps - 1) * c_in}
    options = (slot, coords, turned(stencil), groups, (c_out, c_in), strides)
    return _run_forward("conv2d_dgrad", grad, taps, None, *options)


def _run_forward(
    name: str,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    coords: Tensor,
    stencil: Stencil,
    groups: int,
    channels: Size,
    strides: dict[str, int],
    target: Size | None = None,
) -> Tensor:
    """Choose a configuration and run; ``target`` is given if the convolution is transposed."""
    source = (x.shape[2], x.shape[3])
    density = _density(slot, coords)
    share = active_share(source, stencil, density) if target is None else 1.0
    size = target or stencil.output_size(source)
    tensor_cores = x.dtype != torch.float32 or precision_of(x) == "tf32"
    count, large = x.shape[0] * size[0] * size[1], takes_large_tiles(x.device)
    tiles = conv_tiles(count, *channels, x.element_size(), tensor_cores, share, target is None, large)
    rows = as_rows(x)
    bias = None if bias is None else bias.contiguous()

    def run(tile: Tile) -> Tensor:
        y = rows_like(x, x.shape[0], size, groups * channels[1])
        maps = (slot, coords, stencil, groups, channels, strides, target is not None)
        forward_launch(rows, taps, bias, y, *maps, tile).run()
        return y

    return tuning.best(_key(name, x, size, stencil, channels, groups, density), tiles, run)


def forward_launch(
    rows: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    y: Tensor,
    slot: Tensor,
    coords: Tensor,
    stencil: Stencil,
    groups: int,
    channels: Size,
    strides: dict[str, int],
    transposed: bool,
    tile: Tile,
) -> Launch:
    """Return the launch that fills ``y`` ``(N, C, ph, pw)`` from ``rows`` ``(N, ph, pw, C)`` and weights ``taps``."""
    source, size = (rows.shape[1], rows.shape[2]), (y.shape[2], y.shape[3])
    kinds = stencil.stride if transposed else (1, 1)
    count = y.shape[0] * size[0] * size[1] // (kinds[0] * kinds[1])
    order = row_table(slot, coords, source, stencil, by_taps=True)[1:] if tile.sorted else (None, None)
    programs = ceil(count / tile.m) * ceil(channels[1] / tile.n)
    scalars = (count, slot.shape[1], slot.shape[2], *channels, groups, taps.numel() // groups)
    return Launch(
        patch_conv2d_fwd_kernel,
        (programs, groups, kinds[0] * kinds[1]),
        (rows, taps, bias, y, *row_major(slot, coords), *order, *scalars, *(strides[s] for s in _STRIDES)),
        axes(source, size, stencil)
        | {"TRANSPOSED": transposed, "KINDS_V": kinds[0], "KINDS_H": kinds[1], "ORDERED": tile.sorted}
        | {"PRECISION": precision_of(rows), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
        tile.warps,
        tile.stages,
    )


_STRIDES = ("w_first", "w_out", "w_tap", "w_in")


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed in an order that never changes."""
    size, density = (x.shape[2], x.shape[3]), _density(slot, coords)
    channels = (x.shape[1] // groups, grad.shape[1] // groups)
    tensor_cores = x.dtype != torch.float32 or precision_of(x) == "tf32"
    share, large = active_share(size, stencil, density), takes_large_tiles(x.device)
    tiles = wgrad_tiles(*channels, x.element_size(), tensor_cores, share, large)
    operands = (as_rows(x), as_rows(grad))

    def run(tile: Tile) -> Tensor:
        weight = rows_like(x, grad.shape[1], stencil.kernel, channels[0])
        for launch in wgrad_launches(*operands, weight, slot, coords, stencil, groups, tile):
            launch.run()
        return weight

    return tuning.best(_key("conv2d_wgrad", x, size, stencil, channels, groups, density), tiles, run)


def wgrad_launches(
    x: Tensor, grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int, tile: Tile
) -> list[Launch]:
    """Return the launches that fill ``weight`` from ``x`` and ``grad``, both ``(N, ph, pw, C)``."""
    source, size = (x.shape[1], x.shape[2]), (grad.shape[1], grad.shape[2])
    c_in, c_out = x.shape[3] // groups, grad.shape[3] // groups
    count = grad.shape[0] * size[0] * size[1]
    tiles = stencil.taps * ceil(c_out / tile.m) * ceil(c_in / tile.n)
    wanted = ceil(processors(x.device) * tile.waves / (tiles * groups))
    splits = max(1, min(wanted, ceil(count / (4 * tile.k))))
    parts = x.new_empty(splits, weight.numel(), dtype=torch.float32)
    pairs = listed_rows(slot, coords, source, stencil) if tile.sorted else (None, None, None)
    partial = Launch(
        patch_conv2d_wgrad_kernel,
        (tiles * splits, groups, 1),
        (
            x,
            grad,
            parts,
            *row_major(slot, coords),
            *pairs,
            count,
            slot.shape[1],
            slot.shape[2],
            c_in,
            c_out,
            groups,
            splits,
        ),
        axes(source, size, stencil)
        | {"LISTED": tile.sorted, "PRECISION": precision_of(x)}
        | {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
        tile.warps,
        tile.stages,
    )
    return [partial, sum_launch(parts, weight)]


def sum_launch(parts: Tensor, weight: Tensor) -> Launch:
    """Return the launch that sums ``parts`` ``(splits, weight.numel())`` into ``weight``."""
    block = 512
    arguments = (parts, weight, weight.numel(), parts.shape[0])
    return Launch(sum_splits_kernel, (ceil(weight.numel() / block),), arguments, {"BLOCK": block}, 4, 1)
