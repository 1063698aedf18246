"""``pack`` and ``unpack``: between whole images and the packed layout."""

from __future__ import annotations

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
        ValueError: if the batch differs from the grid's or the grid does not divide the image.

    Equivalent to::

        patches = x.unflatten(2, (Gh, -1)).unflatten(4, (Gw, -1)).permute(0, 2, 4, 1, 3, 5)
        packed = patches[grid.active]
    """
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
        ValueError: if N differs from ``grid.num_active`` or ``fill`` is not a number or ``(C,)``.

    Equivalent to::

        tiles = fill.expand(B, Gh, Gw, ph, pw, C).clone(); tiles[grid.active] = packed.permute(0, 2, 3, 1)
        x = tiles.permute(0, 5, 1, 3, 2, 4).reshape(B, C, Gh * ph, Gw * pw)
    """
    check_packed(packed, grid)
    values = fill_values(fill, packed)
    return ops.unpack(packed, None if values is None else values.to(packed.dtype), grid.slot, grid.coords)


def fill_values(fill: float | Tensor, packed: Tensor) -> Tensor | None:
    """Return ``fill`` as ``(C,)``, None for 0; raise ValueError unless it is a number or one value per channel."""
    channels = packed.shape[1]
    if isinstance(fill, Tensor):
        if fill.numel() == channels:
            return fill.reshape(-1)
        if fill.numel() == 1:
            return fill.reshape(1).expand(channels)
        raise ValueError(f"fill must have one value per channel ({channels}), got {tuple(fill.shape)}")
    return None if fill == 0 else torch.full((channels,), fill, dtype=packed.dtype, device=packed.device)


def check_packed(packed: Tensor, grid: PatchGrid) -> None:
    """Raise ValueError unless ``packed`` is ``(N, C, ph, pw)`` of this grid and on its device."""
    if packed.dim() != 4 or packed.shape[0] != grid.num_active:
        raise ValueError(
            f"packed must be (N, C, ph, pw) with N={grid.num_active} active patches of the grid, "
            f"got {tuple(packed.shape)}; was it packed with another grid?"
        )
    _check_device(packed, grid)


def _check_device(x: Tensor, grid: PatchGrid) -> None:
    if x.device.type != grid.device.type:
        raise ValueError(f"the tensor is on {x.device} and the grid on {grid.device}; use grid.to({x.device.type!r})")
