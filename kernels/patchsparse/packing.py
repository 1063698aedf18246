"""``pack`` and ``unpack``: between whole images and the packed layout."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .grid import PatchGrid
from .ops import layout as ops

__all__ = ["pack", "unpack"]


def pack(x: Tensor, grid: PatchGrid) -> Tensor:
    """Cut the active patches out of an image batch.

    Args:
        x: ``(B, C, H, W)`` of any dtype; H and W are multiples of the grid's ``Gh`` and ``Gw``.
        grid: B images.

    Returns:
        ``(N, C, H / Gh, W / Gw)`` in channels_last memory, rows in the order of ``grid.coords``.

    Raises:
        ValueError: if batch or device differ from the grid's, or the grid does not divide the image.
        TypeError: if ``x`` is no tensor or ``grid`` no grid.

    Equivalent to::

        patches = x.unflatten(2, (Gh, -1)).unflatten(4, (Gw, -1)).permute(0, 2, 4, 1, 3, 5)
        packed = patches[grid.active]
    """
    if not isinstance(grid, PatchGrid) or not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor and grid a PatchGrid, got {type(x).__name__} and {type(grid).__name__}")
    if x.dim() != 4 or x.shape[0] != grid.batch_size:
        raise ValueError(f"x must be (B, C, H, W) with B={grid.batch_size} as the grid, got {tuple(x.shape)}")
    grid.patch_size(x.shape[2:])  # raises where it does not divide
    _check_device(x, grid)
    return ops.pack(x, grid.slot, grid.coords)


def unpack(packed: Tensor, grid: PatchGrid, fill: float | Tensor = 0.0) -> Tensor:
    """Lay packed patches back into whole images.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        fill: value of inactive patches: a number, or a ``(C,)`` tensor such as a learned mask token (differentiable).

    Returns:
        ``(B, C, Gh * ph, Gw * pw)`` in channels_last memory.

    Raises:
        ValueError: if N differs from ``grid.num_active``, devices differ, or ``fill`` is not ``(C,)`` or a number that
            the dtype can hold.
        TypeError: if ``fill`` is of another kind, ``packed`` no tensor or ``grid`` no grid.

    Equivalent to::

        tiles = fill.expand(B, Gh, Gw, ph, pw, C).clone(); tiles[grid.active] = packed.permute(0, 2, 3, 1)
        x = tiles.permute(0, 5, 1, 3, 2, 4).reshape(B, C, Gh * ph, Gw * pw)
    """
    check_packed(packed, grid)
    values = fill_values(fill, packed)
    return ops.unpack(packed, None if values is None else values.to(packed.dtype), grid.slot, grid.coords)


def fill_values(fill: float | Tensor, packed: Tensor) -> Tensor | None:
    """Return ``fill`` as ``(C,)``, None for 0; raise unless it is a number or one value per channel of that kind.

    A fill that the dtype of ``packed`` cannot hold, such as 0.5 among integers, is refused.
    """
    channels, whole_numbers = packed.shape[1], not (packed.is_floating_point() or packed.is_complex())
    if isinstance(fill, Tensor):
        if fill.device != packed.device:
            raise ValueError(f"packed is on {packed.device} and fill on {fill.device}; bring them to one device")
        if (whole_numbers and fill.is_floating_point()) or (fill.is_complex() and not packed.is_complex()):
            raise TypeError(f"packed is {packed.dtype} and fill {fill.dtype}; cast one")
        if fill.numel() == channels:
            return fill.reshape(-1)
        if fill.numel() == 1:
            return fill.reshape(1).expand(channels)
        raise ValueError(f"fill must have one value per channel ({channels}), got {tuple(fill.shape)}")
    if not isinstance(fill, Number):
        raise TypeError(f"fill must be a number or a tensor (C,), got {fill!r}")
    if fill == 0:
        return None
    if not _holds(packed.dtype, fill):
        raise ValueError(f"fill={fill} is no {packed.dtype}; give a number that it can hold")
    return torch.full((channels,), fill, dtype=packed.dtype, device=packed.device)


def _holds(dtype: torch.dtype, number: Any) -> bool:
    """Return whether a dtype has a number, rounded where it is a float one."""
    if dtype.is_complex:
        return True
    if dtype == torch.bool:
        return number in (0, 1)
    if isinstance(number, complex):
        return False
    if dtype.is_floating_point:
        return not math.isfinite(number) or abs(number) <= torch.finfo(dtype).max
    limits = torch.iinfo(dtype)
    return limits.min <= number <= limits.max and number % 1 == 0


def check_packed(packed: Tensor, grid: PatchGrid) -> None:
    """Raise unless ``packed`` is ``(N, C, ph, pw)`` of this grid and on its device."""
    if not isinstance(grid, PatchGrid) or not isinstance(packed, Tensor):
        raise TypeError(f"packed and grid must be a tensor and a PatchGrid, got {type(packed)} and {type(grid)}")
    shape, count = packed.shape, grid.coords.shape[0]
    if len(shape) != 4 or shape[0] != count:
        raise ValueError(
            f"packed must be (N, C, ph, pw) with N={count} active patches of the grid, "
            f"got {tuple(shape)}; was it packed with another grid?"
        )
    _check_device(packed, grid)


def _check_device(x: Tensor, grid: PatchGrid) -> None:
    if x.device != grid.slot.device:
        raise ValueError(f"the tensor is on {x.device} and the grid on {grid.device}; use grid.to({str(x.device)!r})")
    if x.layout is not torch.strided:
        raise ValueError(f"packed tensors and images must be strided, got {x.layout}; use x.to_dense()")
