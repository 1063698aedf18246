"""The patch grid: which patches of which image are active, and where each one lies in the packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["PatchGrid", "whole_grid"]


class PatchGrid:
    """Hold the active patches of a batch of images; immutable, shared by every layer of a network.

    A stride shrinks the pixels of a patch and never the grid, so one grid serves all stages.
    Build one with :meth:`random`, :meth:`from_scores` or :meth:`from_active`.

    Attributes:
        active: ``(B, Gh, Gw)`` bool, True where the patch is visible.
        coords: ``(N, 3)`` int32, (image, row, column) of each row of the packed batch.
        slot: ``(B, Gh, Gw)`` int32, the row of a patch in the packed batch, -1 where inactive.
    """

    def __init__(self, active: Tensor, coords: Tensor, slot: Tensor, per_image: int | None = None):
        self.active = active
        self.coords = coords
        self.slot = slot
        self._per_image = per_image

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
            keep: a float in [0, 1] is the visible share (rounded to whole patches), an int their number.
            generator: source of randomness; its device is where the draw happens.
            device: where the grid lives; default the generator's device, else the CPU.

        Raises:
            ValueError: if ``keep`` is out of range or ``shape`` is not positive.
        """
        if generator is not None and device is None:
            device = generator.device
        draw_on = generator.device if generator is not None else device
        scores = torch.rand((batch, *shape), generator=generator, device=draw_on)
        return cls.from_scores(scores.to(device), keep)

    @classmethod
    def from_scores(cls, scores: Tensor, keep: float) -> PatchGrid:
        """Activate the ``keep`` highest-scoring patches of each image, without host synchronisation.

        Args:
            scores: ``(B, Gh, Gw)`` float, higher is kept first; ties keep the lower index on the CPU.
            keep: a float in [0, 1] is a share of ``Gh * Gw`` (rounded), an int a number of patches.

        Raises:
            ValueError: if ``scores`` is not three-dimensional, holds NaN on the CPU, or ``keep`` is out of range.
        """
        if scores.dim() != 3 or 0 in scores.shape[1:]:
            raise ValueError(f"scores must be (B, Gh, Gw) with positive Gh and Gw, got {tuple(scores.shape)}")
        batch, rows, columns = scores.shape
        count = _visible_count(keep, rows * columns)
        chosen = scores.flatten(1).topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        numbers = torch.arange(batch * count, dtype=torch.int32, device=scores.device).view(batch, count)
        slot = torch.full((batch, rows * columns), -1, dtype=torch.int32, device=scores.device)
        slot = slot.scatter_(1, chosen, numbers).view(batch, rows, columns)
        place = chosen.int()
        coords = torch.stack((numbers // max(1, count), place // columns, place % columns), dim=-1).view(-1, 3)
        return cls(slot >= 0, coords, slot, per_image=count)

    @classmethod
    def from_active(cls, active: Tensor) -> PatchGrid:
        """Take the visible patches from a boolean map; counts may differ from image to image.

        Args:
            active: ``(B, Gh, Gw)`` bool, True = visible. On a GPU this synchronises with the host once.

        Raises:
            ValueError: if ``active`` is not a three-dimensional bool tensor.
        """
        if active.dim() != 3 or active.dtype != torch.bool:
            raise ValueError(f"active must be (B, Gh, Gw) bool, got {tuple(active.shape)} {active.dtype}")
        return cls._from_coords(active, active.nonzero(), per_image=None)

    @classmethod
    def _from_coords(cls, active: Tensor, coords: Tensor, per_image: int | None) -> PatchGrid:
        slot = torch.full(active.shape, -1, dtype=torch.int32, device=active.device)
        numbers = torch.arange(coords.shape[0], dtype=torch.int32, device=active.device)
        slot[coords[:, 0], coords[:, 1], coords[:, 2]] = numbers
        return cls(active, coords.to(torch.int32).contiguous(), slot, per_image)  # nonzero() is column-major

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

        Raises:
            ValueError: if the grid does not divide ``size``.
        """
        (rows, columns), (height, width) = self.shape, size
        if height % rows or width % columns:
            raise ValueError(
                f"a grid of {rows}x{columns} patches does not divide an image of {height}x{width} pixels; "
                f"crop or pad it to multiples of {rows} and {columns}"
            )
        return height // rows, width // columns

    def pixels(self, size: Sequence[int]) -> Tensor:
        """Return ``(B, H, W)`` bool, True at the pixels of active patches, for an image or feature map of ``size``.

        Args:
            size: height and width in pixels, ``(H, W)``.

        Raises:
            ValueError: if the grid does not divide ``size``.

        Equivalent to::

            active.repeat_interleave(H // Gh, 1).repeat_interleave(W // Gw, 2)
        """
        height, width = self.patch_size(size)
        spread = self.active[:, :, None, :, None].expand(-1, -1, height, -1, width)
        return spread.flatten(3).flatten(1, 2)

    def complement(self) -> PatchGrid:
        """Return the grid of the patches that are inactive here."""
        if self._per_image is None:
            return PatchGrid.from_active(~self.active)
        rest = self.shape[0] * self.shape[1] - self._per_image
        return PatchGrid.from_scores((~self.active).float(), rest)

    def permute(self, order: Tensor) -> PatchGrid:
        """Return the same active set with packed rows in another order: new row i is old row ``order[i]``."""
        return PatchGrid._from_coords(self.active, self.coords[order.to(self.device)].long(), self._per_image)

    def to(self, device: torch.device | str) -> PatchGrid:
        """Return the grid on another device."""
        return PatchGrid(self.active.to(device), self.coords.to(device), self.slot.to(device), self._per_image)

    def __repr__(self) -> str:
        share = self.num_active / max(1, self.active.numel())
        return (
            f"PatchGrid(batch={self.batch_size}, shape={self.shape}, num_active={self.num_active} "
            f"({share:.0%}), device={self.device})"
        )


@lru_cache(maxsize=32)
def whole_grid(batch: int) -> PatchGrid:
    """Return the grid of one active patch for each of ``batch`` images, on the CPU.

    It is made once, so that engines keep the row lists of all sizes they have met on it.
    """
    with torch.inference_mode(False):
        return PatchGrid.from_active(torch.ones(batch, 1, 1, dtype=torch.bool))


def _visible_count(keep: float, total: int) -> int:
    """Turn a share or a number of visible patches into a number."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ValueError(f"keep must be a share (float) or a number (int) of patches, got {keep!r}")
    count = keep if isinstance(keep, int) else round(total * keep)
    if not 0 <= count <= total or (isinstance(keep, float) and not 0.0 <= keep <= 1.0):
        raise ValueError(f"keep={keep} is out of range: give a share in [0, 1] or at most {total} patches")
    return count
