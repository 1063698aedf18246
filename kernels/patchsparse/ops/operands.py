"""Checks of what operators are called with, so that no engine follows a wrong operand into foreign memory.

The front door checks more, and earlier; this is for whoever calls an operator itself, and it is what an engine may
rely on. Stencils, channels and groups are checked once for all calls alike, by `patchsparse.backends.choose`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maps import check_maps
from .calls import Ints

__all__ = [
    "check_fill",
    "check_image",
    "check_like",
    "check_packed",
    "check_same",
    "check_taps",
    "check_vectors",
    "check_weight",
    "one_device",
]


def check_packed(x: Tensor, slot: Tensor, coords: Tensor) -> None:
    """Raise unless ``x`` is ``(N, C, ph, pw)`` with one row for each of ``coords``, on the device of the maps."""
    check_maps(slot, coords)
    shape = x.shape
    if len(shape) != 4 or shape[0] != coords.shape[0]:
        raise ValueError(
            f"packed tensors must be (N, C, ph, pw) with N={coords.shape[0]} rows as coords, got {tuple(shape)}; "
            "was it packed with another grid?"
        )
    if x.device != slot.device:
        raise ValueError(f"the packed tensor is on {x.device} and the maps on {slot.device}; use grid.to(device)")
    if x.layout is not torch.strided:
        raise ValueError(f"packed tensors must be strided, got {x.layout}; use x.to_dense()")


def check_image(x: Tensor, slot: Tensor, coords: Tensor) -> None:
    """Raise unless ``x`` is ``(B, C, H, W)`` as ``slot``, with whole patches, on the device of the maps."""
    check_maps(slot, coords)
    shape, (batch, rows, columns) = x.shape, slot.shape
    if len(shape) != 4 or shape[0] != batch or shape[2] % rows or shape[3] % columns or 0 in shape[2:]:
        raise ValueError(
            f"images must be (B, C, H, W) with B={batch}, H and W multiples of {rows} and {columns}, got {tuple(shape)}"
        )
    if x.device != slot.device:
        raise ValueError(f"the images are on {x.device} and the maps on {slot.device}; use grid.to(device)")
    if x.layout is not torch.strided:
        raise ValueError(f"images must be strided, got {x.layout}; use x.to_dense()")


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool = False) -> None:
    """Raise unless ``weight`` ``(C_out, C_in / groups, kh, kw)`` takes ``x``, and ``bias`` is ``(C_out,)``.

    ``transposed``: ``x`` has the output's channels.
    """
    shape = weight.shape
    if len(shape) != 4 or x.shape[1] != (shape[0] if transposed else shape[1] * groups):
        raise ValueError(f"weight {tuple(shape)} with groups={groups} does not take {x.shape[1]} channels")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias must be ({shape[0]},), got {tuple(bias.shape)}")
    _check_kind(x, weight, "weight")
    if bias is not None:
        _check_kind(x, bias, "bias")


def check_like(x: Tensor, other: Tensor, name: str, size: Ints, channels: int) -> None:
    """Raise unless ``other`` ``(N, channels, *size)`` goes with packed ``x``."""
    if other.shape != (x.shape[0], channels, *size):
        raise ValueError(
            f"{name} must be {(x.shape[0], channels, *size)} as x {tuple(x.shape)} asks, got {tuple(other.shape)}"
        )
    _check_kind(x, other, name)


def check_same(x: Tensor, **others: Tensor | None) -> None:
    """Raise unless each of the others has the shape and device of packed ``x``, or is None."""
    for name, other in others.items():
        if other is not None and (other.shape != x.shape or other.device != x.device or other.layout != x.layout):
            raise ValueError(
                f"{name} must be as packed {tuple(x.shape)} {x.layout} on {x.device}, "
                f"got {tuple(other.shape)} {other.layout} on {other.device}"
            )


def one_device(arguments: Sequence[object]) -> None:
    """Raise unless all tensors among ``arguments`` are on one device: a shape function looks at the first alone."""
    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    if len(devices) > 1:
        names = " and ".join(sorted(str(device) for device in devices))
        raise ValueError(f"tensors are on {names}; bring them to one device")


def check_taps(grad: Tensor, tap: Tensor, taps: int) -> None:
    """Raise unless ``tap`` ``(N, C, ph, pw)`` uint8 has one of that many ``taps`` for each number of ``grad``."""
    if tap.shape != grad.shape or tap.dtype != torch.uint8 or tap.device != grad.device:
        raise ValueError(
            f"tap must be {tuple(grad.shape)} uint8 on {grad.device}, "
            f"got {tuple(tap.shape)} {tap.dtype} on {tap.device}; it is what max_pool2d returned"
        )
    if taps > 255:
        raise ValueError(f"max_pool2d takes at most 255 taps, got a kernel of {taps}")


def check_fill(x: Tensor, fill: Tensor | None) -> None:
    """Raise unless ``fill`` is ``(C,)`` on the device of ``x``, or None."""
    if fill is not None and (fill.shape != x.shape[1:2] or fill.device != x.device):
        raise ValueError(
            f"fill must be ({x.shape[1]},) on {x.device}, one value per channel, "
            f"got {tuple(fill.shape)} on {fill.device}"
        )


def check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise unless each vector is ``(C,)`` of a float dtype on the device of ``x`` ``(N, C, ph, pw)``, or None."""
    shape = x.shape
    if len(shape) != 4 or x.layout is not torch.strided:
        raise ValueError(f"packed must be (N, C, ph, pw) and strided, got {tuple(shape)} {x.layout}")
    wanted, device = shape[1:2], x.device
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != wanted or vector.device != device:
            raise ValueError(
                f"{name} must be ({x.shape[1]},) on {device}, one value per channel of packed {tuple(x.shape)}, "
                f"got {tuple(vector.shape)} on {vector.device}"
            )
        if not vector.is_floating_point() or vector.layout is not torch.strided:
            raise TypeError(f"{name} must be of a float dtype and strided, got {vector.dtype} {vector.layout}")


def _check_kind(x: Tensor, other: Tensor, name: str) -> None:
    if other.dtype != x.dtype:
        raise TypeError(f"packed is {x.dtype} and {name} {other.dtype}; cast one, or use torch.autocast")
    if other.device != x.device:
        raise ValueError(f"packed is on {x.device} and {name} on {other.device}; bring them to one device")
    if other.layout is not torch.strided:
        raise ValueError(f"{name} must be strided, got {other.layout}; use to_dense()")
