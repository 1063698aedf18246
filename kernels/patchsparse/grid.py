"""The patch grid: which patches of which image are active, and where each one lies in the packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isnan
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .geometry import pair, whole
from .maps import MOST_PATCHES, ask_values, check_maps, ordinary, trust_maps

__all__ = ["PatchGrid", "whole_grid"]


class PatchGrid:
    """Hold the active patches of a batch of images; immutable, shared by every layer of a network.

    A stride shrinks the pixels of a patch and never the grid, so one grid serves all stages. Build one with
    :meth:`random`, :meth:`from_scores` or :meth:`from_active`; one made in inference mode serves training, too.

    ``PatchGrid(active, coords, slot)`` takes maps of your own, without a copy unless they were made in inference mode,
    and checks them once; for their values it waits for a GPU, or leaves them while a CUDA graph is captured. Maps that
    are changed in place are checked anew by the next operator.

    Attributes:
        active: ``(B, Gh, Gw)`` bool, True where the patch is visible.
        coords: ``(N, 3)`` int32, (image, row, column) of each row of the packed batch.
        slot: ``(B, Gh, Gw)`` int32, the row of a patch in the packed batch, -1 where inactive.

    Raises:
        TypeError: if maps have other dtypes.
        ValueError: if they do not belong together, or counts per image are not ``per_image``.
        AttributeError: when an attribute is set.
    """

    active: Tensor
    coords: Tensor
    slot: Tensor
    _per_image: int | None

    @ordinary
    def __init__(self, active: Tensor, coords: Tensor, slot: Tensor, per_image: int | None = None):
        self._hold(*_checked_maps(active, coords, slot, per_image), per_image)

    def _hold(self, active: Tensor, coords: Tensor, slot: Tensor, per_image: int | None) -> None:
        held = {"active": active, "coords": coords, "slot": slot, "_per_image": per_image}
        for name, value in held.items():
            object.__setattr__(self, name, value)

    @classmethod
    def _made(cls, active: Tensor, coords: Tensor, slot: Tensor, per_image: int | None) -> PatchGrid:
        """Return the grid of maps that are right by construction."""
        grid = cls.__new__(cls)
        grid._hold(active, coords, slot, per_image)
        trust_maps(slot, coords)
        return grid

    def __setattr__(self, name: str, *value: Any) -> NoReturn:
        raise AttributeError(f"a PatchGrid is immutable: {name} cannot be changed; build another with from_active")

    __delattr__ = __setattr__

    @classmethod
    def random(
        cls,
        batch: int,
        shape: tuple[int, int],
        keep: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> PatchGrid:
        """Draw ``keep`` visible patches per image, uniformly and without replacement.

        Args:
            batch: number of images B.
            shape: patches per column and row, ``(Gh, Gw)``.
            keep: a float in [0, 1] is the visible share (rounded to whole patches), an int their number; numpy's too.
            generator: source of randomness; its device is where the draw happens.
            device: where the grid lives; default the generator's device, else the CPU.

        Raises:
            ValueError: if ``batch`` is negative, ``shape`` is not positive, or ``keep`` is out of range or no number.
            TypeError: if ``batch`` or ``shape`` are not ints.
        """
        batch, (rows, columns) = whole(batch, "batch"), pair(shape, "shape")
        _check_number(batch, rows, columns)
        draw_on = device if generator is None else generator.device
        scores = torch.rand((batch, rows, columns), generator=generator, device=draw_on)
        return _of_scores(scores.to(device or draw_on), _visible_count(keep, rows * columns))

    @classmethod
    def from_scores(cls, scores: Tensor, keep: float) -> PatchGrid:
        """Activate the ``keep`` highest-scoring patches of each image, without host synchronisation.

        Args:
            scores: ``(B, Gh, Gw)`` of a float or integer dtype, higher is kept first; ties keep the lower index on the
                CPU. NaN is looked for on a CPU alone; a GPU would have to be waited for.
            keep: a float in [0, 1] is a share of ``Gh * Gw`` (rounded), an int a number of patches; numpy's too.

        Raises:
            ValueError: if ``scores`` is not three-dimensional, holds NaN on the CPU, or ``keep`` is out of range.
            TypeError: if ``scores`` is no tensor of real numbers.
        """
        _check_map(scores, "scores")
        if scores.dtype == torch.bool or scores.is_complex():
            raise TypeError(f"scores must be numbers that can be ordered, got {scores.dtype}; use scores.float()")
        count = _visible_count(keep, scores.shape[1] * scores.shape[2])
        if scores.is_cpu and ask_values(scores) and scores.numel() and isnan(scores.max()):  # it keeps NaN
            raise ValueError("scores holds NaN, which has no place in an order; replace it, as by scores.nan_to_num()")
        return _of_scores(scores, count)

    @classmethod
    @ordinary
    def from_active(cls, active: Tensor) -> PatchGrid:
        """Take the visible patches from a copy of a boolean map; counts may differ from image to image.

        Args:
            active: ``(B, Gh, Gw)`` bool, True = visible. On a GPU this synchronises with the host once.

        Raises:
            ValueError: if ``active`` is not a three-dimensional bool tensor with patches.
            TypeError: if it is not a tensor.
        """
        _check_map(active, "active")
        if active.dtype != torch.bool:
            raise ValueError(f"active must be (B, Gh, Gw) bool, got {tuple(active.shape)} {active.dtype}")
        return _of_coords(active.clone(), active.nonzero(), None)

    @property
    def batch_size(self) -> int:
        """Number of images B."""
        return self.active.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Patches per column and row, ``(Gh, Gw)``."""
        return self.active.shape[1], self.active.shape[2]

    @property
    def num_active(self) -> int:
        """Number N of active patches in the batch: the batch dimension of every packed tensor."""
        return self.coords.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the maps live."""
        return self.active.device

    @property
    def image(self) -> Tensor:
        """``(N,)`` int64, the image that each packed row belongs to."""
        return self.coords[:, 0].long()

    def counts(self) -> Tensor:
        """Return ``(B,)`` int64, the number of active patches of each image."""
        return self.active.flatten(1).sum(1)

    def patch_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return height and width of a patch in pixels, in an image or feature map of ``size`` (H, W).

        Raises TypeError unless ``size`` is a pair of ints, ValueError unless it is positive and the grid divides it.
        """
        (rows, columns), (height, width) = self.shape, size if type(size) is torch.Size else pair(size, "size")
        if height % rows or width % columns or height < 1 or width < 1:
            raise ValueError(
                f"a grid of {rows}x{columns} patches does not divide an image of {height}x{width} pixels; "
                f"crop or pad it to multiples of {rows} and {columns}"
            )
        return height // rows, width // columns

    def pixels(self, size: Sequence[int]) -> Tensor:
        """Return ``(B, H, W)`` bool, True at the pixels of active patches, for an image or feature map of ``size``.

        Raises as `patch_size` does. Equivalent to::

            active.repeat_interleave(H // Gh, 1).repeat_interleave(W // Gw, 2)
        """
        height, width = self.patch_size(size)
        spread = self.active[:, :, None, :, None].expand(-1, -1, height, -1, width)
        return spread.flatten(3).flatten(1, 2)

    def complement(self) -> PatchGrid:
        """Return the grid of the patches that are inactive here."""
        if self._per_image is None:
            return PatchGrid.from_active(~self.active)
        return _of_scores((~self.active).float(), self.shape[0] * self.shape[1] - self._per_image)

    @ordinary
    def permute(self, order: Tensor) -> PatchGrid:
        """Return the same active set with packed rows in another order: new row i is old row ``order[i]``.

        ``order`` is ``(N,)`` of an integer dtype. On a GPU this synchronises with the host once.

        Raises:
            TypeError: if ``order`` is not a tensor of integers.
            ValueError: if it has another length, or a row is out of range or repeated.
        """
        rows = _checked_order(order, self.num_active, self.device)
        return _of_coords(self.active, self.coords[rows].long(), self._per_image)

    @ordinary
    def to(self, device: torch.device | str) -> PatchGrid:
        """Return the grid on another device; itself where it is there."""
        slot = self.slot.to(device)
        maps = (self.active.to(device), self.coords.to(device), slot, self._per_image)
        return self if slot is self.slot else PatchGrid._made(*maps)

    def __repr__(self) -> str:
        count, share = self.num_active, self.num_active / max(1, self.active.numel())
        where = f"batch={self.batch_size}, shape={self.shape}"
        return f"PatchGrid({where}, num_active={count} ({share:.0%}), device={self.device})"


@lru_cache(maxsize=32)
def whole_grid(batch: int) -> PatchGrid:
    """Return the grid of one active patch for each of ``batch`` images, on the CPU.

    It is made once, so that engines keep the row lists of all sizes they have met on it.
    """
    return PatchGrid.from_active(torch.ones(batch, 1, 1, dtype=torch.bool))


@ordinary
def _of_scores(scores: Tensor, count: int) -> PatchGrid:
    """Activate the ``count`` highest-scoring patches of each image."""
    batch, rows, columns = scores.shape
    chosen = scores.flatten(1).topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    numbers = torch.arange(batch * count, dtype=torch.int32, device=scores.device).view(batch, count)
    slot = torch.full((batch, rows * columns), -1, dtype=torch.int32, device=scores.device)
    slot = slot.scatter_(1, chosen, numbers).view(batch, rows, columns)
    place = chosen.int()
    coords = torch.stack((numbers // max(1, count), place // columns, place % columns), dim=-1).view(-1, 3)
    return PatchGrid._made(slot >= 0, coords, slot, count)


def _of_coords(active: Tensor, coords: Tensor, per_image: int | None) -> PatchGrid:
    """Number the patches of ``active`` in the order of ``coords`` ``(N, 3)`` int64."""
    slot = torch.full(active.shape, -1, dtype=torch.int32, device=active.device)
    slot[coords.unbind(1)] = torch.arange(coords.shape[0], dtype=torch.int32, device=active.device)
    return PatchGrid._made(active, coords.to(torch.int32).contiguous(), slot, per_image)  # nonzero() is column-major


def _checked_order(order: Tensor, count: int, device: torch.device) -> Tensor:
    """Return ``order`` as ``(N,)`` int64 on a device; raise unless it names each of ``count`` rows once."""
    kind = order.dtype if isinstance(order, Tensor) else type(order).__name__
    if kind not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"order must be a tensor of row numbers (int64), got {kind}")
    if order.shape != (count,):
        raise ValueError(f"order must be ({count},), one number for each row, got {tuple(order.shape)}")
    rows = order.to(device, torch.int64)
    if ask_values(rows) and not torch.equal(rows.sort().values, torch.arange(count, device=device)):
        raise ValueError(f"order must name each row from 0 to {count - 1} once, as torch.randperm does")
    return rows


def _checked_maps(active: Tensor, coords: Tensor, slot: Tensor, per_image: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps, as ordinary tensors; raise unless they belong together."""
    if not all(isinstance(x, Tensor) for x in (active, coords, slot)):
        raise TypeError("active, coords and slot must be tensors; see PatchGrid.from_active")
    active, coords, slot = (x.clone() if x.is_inference() else x for x in (active, coords, slot))
    check_maps(slot, coords)
    _check_active(active, slot, per_image)
    return active, coords, slot


def _check_active(active: Tensor, slot: Tensor, per_image: int | None) -> None:
    """Raise unless ``active`` is True where ``slot`` names a row, ``per_image`` times for each image."""
    if active.dtype != torch.bool or active.shape != slot.shape or active.device != slot.device:
        raise ValueError(
            f"active must be {tuple(slot.shape)} bool on {slot.device} as slot, "
            f"got {tuple(active.shape)} {active.dtype} on {active.device}"
        )
    if not ask_values(slot):
        return
    if not torch.equal(active, slot >= 0):
        raise ValueError("active and slot disagree; build the grid with PatchGrid.from_active(active)")
    if per_image is not None and bool((active.flatten(1).sum(1) != per_image).any()):
        raise ValueError(f"per_image is {per_image}, and images have other numbers of active patches")


def _check_map(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is a tensor ``(B, Gh, Gw)`` with positive sides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (B, Gh, Gw), got {type(x).__name__}; use torch.as_tensor({name})")
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(
            f"{name} must be (B, Gh, Gw) with positive Gh and Gw, got {tuple(x.shape)} {x.dtype}; give one map an image"
        )
    _check_number(*x.shape)


def _check_number(batch: int, rows: int, columns: int) -> None:
    if batch < 0 or min(rows, columns) < 1:
        raise ValueError(f"a grid needs a positive shape and no negative batch, got {batch} maps of {rows}x{columns}")
    if max(1, batch) * rows * columns > MOST_PATCHES:
        raise ValueError(f"a grid has at most {MOST_PATCHES} patches, got {batch} maps of {rows}x{columns}")


def _visible_count(keep: float, total: int) -> int:
    """Turn a share or a number of visible patches into a number."""
    if isinstance(keep, bool) or not isinstance(keep, (Integral, Real)):
        raise ValueError(f"keep must be a share (float) or a number (int) of patches, got {keep!r}")
    if not 0 <= keep <= (total if isinstance(keep, Integral) else 1):
        raise ValueError(f"keep={keep} is out of range: give a share in [0, 1] or at most {total} patches")
    return int(keep) if isinstance(keep, Integral) else round(total * float(keep))
