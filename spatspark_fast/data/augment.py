"""Crop, flip and turn windows at random, as a pure function of (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.errors import UserError

__all__ = ["Augmentation"]

Stack = TypeVar("Stack", bound=NDArray[Any])


@dataclass(frozen=True)
class Augmentation:
    """Choose what is done to windows: a random crop, random flips of both axes, random quarter turns.

    All frames of a window, and its valid pixels, are treated alike. A resumed run repeats it exactly.
    """

    crop: tuple[int, int] | None = None
    flip: bool = False
    quarter_turns: bool = False
    seed: int = 0

    def check(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size of what comes out of images of that size.

        Raises:
            UserError: the crop is larger than the image, or turns would change the shape.
        """
        if self.crop is not None and not (0 < self.crop[0] <= size[0] and 0 < self.crop[1] <= size[1]):
            raise UserError(f"crop {self.crop} does not fit into images of {size[0]} x {size[1]} pixels")
        height, width = self.crop or size
        if self.quarter_turns and height != width:
            raise UserError(f"quarter_turns needs square images, not {height} x {width}; give a square crop")
        return height, width

    def apply(self, stacks: tuple[Stack, ...], epoch: int, index: int) -> tuple[Stack, ...]:
        """Treat arrays ``(T, H, W)`` of one size alike; they come back contiguous."""
        if self.crop is None and not self.flip and not self.quarter_turns:
            return stacks
        rng = np.random.default_rng((self.seed, epoch, index))
        size = stacks[0].shape[-2:]
        height, width = self.crop or size
        # Every number is drawn in any case: switching one option must not change what another one does.
        top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(size, (height, width), strict=True))
        flip_rows, flip_columns = (bool(draw) for draw in rng.integers(0, 2, size=2))
        turns = int(rng.integers(0, 4))

        def treat(stack: Stack) -> Stack:
            view = stack[..., top : top + height, left : left + width]
            if self.flip and flip_rows:
                view = view[..., ::-1, :]
            if self.flip and flip_columns:
                view = view[..., ::-1]
            if self.quarter_turns:
                view = np.rot90(view, turns, axes=(-2, -1))
            return np.ascontiguousarray(view)  # pyright: ignore[reportReturnType]

        return tuple(treat(stack) for stack in stacks)
