"""Plans of the ``cpp`` engine: which source row each target row reads, built once per mask and geometry."""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from ...geometry import Stencil
from ...maps import check_maps
from ..tables import remember
from . import library, native

__all__ = ["Plan", "adjoint_plan", "lists_of", "plan_for"]

Size = tuple[int, int]


class Plan:
    """Own a ``ps_plan``.

    Raises:
        MemoryError: if there is no memory for its lists.
        ValueError: if int32 maps lead out of the images or the packed rows, or numbers are out of range.
        RuntimeError: if the library is missing.
    """

    def __init__(self, slot: Tensor, coords: Tensor, geometry: native.Geometry):
        self.handle, pointer = library.engine(), ctypes.c_void_p()
        maps = (slot.data_ptr(), coords.data_ptr())
        status = self.handle.ps_plan_create(byref(geometry), *maps, torch.get_num_threads(), byref(pointer))
        native.check_status(status, "the row lists of a mask")
        self.pointer = pointer.value

    def __del__(self) -> None:
        if getattr(self, "pointer", None):
            self.handle.ps_plan_destroy(self.pointer)

    def statistics(self) -> dict[str, int]:
        """Return the numbers of rows, active pairs and groups."""
        numbers = (ctypes.c_int64 * 5)()
        self.handle.ps_plan_statistics(self.pointer, numbers)
        names = ("targets", "sources", "pairs", "groups", "groups_stored_once")
        return dict(zip(names, numbers, strict=True))


def plan_for(
    slot: Tensor, coords: Tensor, source: Size, stencil: Stencil, adjoint: bool, lists: int = native.NO_LISTS
) -> Plan:
    """Return the plan of a stencil operation on patches of ``source`` pixels, built once per mask and geometry."""

    def build() -> Plan:
        check_maps(slot, coords)
        pairs = (source, stencil.kernel, stencil.stride, stencil.padding, stencil.dilation)
        numbers = (slot.shape[0], coords.shape[0], slot.shape[1], slot.shape[2], int(adjoint), lists)
        return Plan(slot, coords, native.Geometry(*numbers, *pairs))

    return remember(slot, ("cpp", source, stencil, adjoint, lists), build)


def adjoint_plan(slot: Tensor, coords: Tensor, source: Size, stencil: Stencil, lists: int) -> tuple[Plan, bool]:
    """Return the plan of an input gradient, and whether it reads the taps in reverse.

    With stride 1 the gradient is the same operation with the kernel turned round. The plan of the forward pass then
    serves again wherever the padding is symmetrical.
    """
    if stencil.stride != (1, 1):
        return plan_for(slot, coords, source, stencil, True, lists), False
    turned = tuple(d * (k - 1) - p for k, p, d in zip(stencil.kernel, stencil.padding, stencil.dilation, strict=True))
    around = Stencil(stencil.kernel, stencil.stride, (turned[0], turned[1]), stencil.dilation)
    return plan_for(slot, coords, source, around, False, lists), True


def lists_of(groups: int, fast: bool) -> int:
    """Return the lists that a convolution reads: depthwise, by Winograd's method (``fast``), or direct."""
    return native.SQUARES if groups != 1 else native.NO_LISTS if fast else native.GROUPS
