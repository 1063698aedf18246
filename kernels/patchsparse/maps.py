"""The two maps of a grid that engines read, ``slot`` and ``coords``: checked once for each pair, whoever brings them.

Engines follow the maps into memory, so a number out of range would read or write what belongs to others. A pair is
looked at when it is first met, by `PatchGrid` or by an operator that was called without one. It is remembered for as
long as both tensors live and neither is changed in place, so that later calls compare two references and two versions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar
from weakref import ref

import torch
from torch import Tensor

from .eager import is_traced

__all__ = ["MOST_PATCHES", "ask_values", "check_maps", "ordinary", "trust_maps"]

MOST_PATCHES = 2**31 - 1  # the maps are int32

P = ParamSpec("P")
T = TypeVar("T")
_Pair = tuple[Callable[[], Any], Callable[[], Any], int, int]  # slot, coords, and their versions
_known: dict[int, _Pair] = {}  # by the id of its slot map, for as long as that lives
_last: _Pair = (lambda: None, lambda: None, 0, 0)  # the pair that was met last, of one layer after the other


def check_maps(slot: Tensor, coords: Tensor) -> None:
    """Raise unless the maps belong together: row i of ``coords`` names the one place where ``slot`` holds i.

    Their values are looked at on a CPU, and on a GPU outside of a capture, where that waits for the device: once for
    each pair of maps, never for a grid of `PatchGrid.random`, `.from_scores` or `.from_active`, right by construction.

    Args:
        slot: ``(B, Gh, Gw)`` int32, contiguous, -1 where inactive.
        coords: ``(N, 3)`` int32, contiguous, on the same device.

    Raises:
        TypeError: if either is not int32.
        ValueError: for shapes, devices, strides or values that no grid has.
    """
    last_slot, last_coords, slot_version, coords_version = _last
    if (
        last_slot() is slot
        and last_coords() is coords
        and slot_version == slot._version
        and coords_version == coords._version
    ):
        return
    _check(slot, coords)


def trust_maps(slot: Tensor, coords: Tensor) -> None:
    """Remember a pair of maps that is right by construction."""
    if not torch.compiler.is_compiling():
        key = id(slot)
        _known[key] = (ref(slot, partial(_forget, key)), ref(coords), slot._version, coords._version)


def _forget(key: int, dead: Any) -> None:
    _known.pop(key, None)


def ask_values(x: Tensor) -> bool:
    """Return whether the values of ``x`` may be looked at: it has some, nobody records, no CUDA graph is captured."""
    if is_traced() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def ordinary(function: Callable[P, T]) -> Callable[P, T]:
    """Call ``function`` with inference mode off, so that tensors it makes can serve training too."""

    @wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **named)
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments, **named)

    return call


def _check(slot: Tensor, coords: Tensor) -> None:
    """Look the pair up, or look at it; remember it if its values were seen."""
    global _last
    if not isinstance(slot, Tensor) or not isinstance(coords, Tensor):
        raise TypeError(f"slot and coords must be tensors, got {type(slot).__name__} and {type(coords).__name__}")
    if slot.is_inference() or coords.is_inference():  # no version tells of their changes
        _check_pair(slot, coords)
        return
    pair = _known.get(id(slot))
    if pair is None or pair[0]() is not slot or pair[1]() is not coords or pair[2:] != (slot._version, coords._version):
        if not _check_pair(slot, coords):
            return
        trust_maps(slot, coords)
        pair = _known[id(slot)]
    _last = pair


def _check_pair(slot: Tensor, coords: Tensor) -> bool:
    """Raise unless the maps belong together; return whether their values were looked at."""
    for name, x in (("slot", slot), ("coords", coords)):
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {x.dtype}; take grid.{name} of a PatchGrid")
    if slot.dim() != 3 or coords.dim() != 2 or coords.shape[1] != 3:
        raise ValueError(
            f"slot must be (B, Gh, Gw) and coords (N, 3), got {tuple(slot.shape)} and {tuple(coords.shape)}; "
            "take grid.slot and grid.coords of a PatchGrid"
        )
    if max(slot.shape) > MOST_PATCHES or slot.numel() > MOST_PATCHES:
        raise ValueError(f"a grid has at most {MOST_PATCHES} patches, slot is {tuple(slot.shape)}")
    if slot.device != coords.device:
        raise ValueError(f"slot is on {slot.device} and coords on {coords.device}; use grid.to(device)")
    if not (slot.is_contiguous() and coords.is_contiguous()):
        raise ValueError("slot and coords must be contiguous; call .contiguous() on both")
    if not ask_values(slot):
        return False
    if problem := _wrong_values(slot, coords):
        raise ValueError(f"slot and coords are not the maps of a grid: {problem}; build one with PatchGrid.from_active")
    return True


def _wrong_values(slot: Tensor, coords: Tensor) -> str | None:
    """Return in what way the values of a pair of maps are wrong, or None."""
    shape, count = tuple(slot.shape), coords.shape[0]
    limits = torch.tensor(shape, dtype=torch.int32, device=coords.device)
    if not bool(((coords >= 0) & (coords < limits)).all()):
        return f"coords has numbers outside of {shape}"
    image, row, column = coords.long().unbind(1)
    if not torch.equal(slot[image, row, column], torch.arange(count, dtype=torch.int32, device=slot.device)):
        return "slot does not hold i where row i of coords says"
    if int((slot != -1).sum()) != count:
        return f"slot names more patches than the {count} of coords, or marks inactive ones by another number than -1"
    return None
