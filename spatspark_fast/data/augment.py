"""Crop, flip and turn windows at random, as a pure function of (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common.errors import UserError

__all__ = ["Affine", "Augmentation"]

Stack = TypeVar("Stack", bound=NDArray[Any])


class Affine(NamedTuple):
    """Say where a treated image lies in the whole one: pixel (i, j) is ``offset + i * down + j * right``.

    All three count pixels of the whole image, row after row.
    """

    offset: int
    down: int
    right: int


class _Draw(NamedTuple):
    top: int
    left: int
    flip_rows: bool
    flip_columns: bool
    turns: int


@dataclass(frozen=True)
class Augmentation:
    """Choose what is done to windows: a random crop, random flips of both axes, random quarter turns.

    All frames of a window, and its valid pixels, are treated alike. A resumed run repeats it exactly.
    """

    crop: tuple[int, int] | None = None
    flip: bool = False
    quarter_turns: bool = False
    seed: int = 0

    @property
    def idle(self) -> bool:
        """Tell whether windows stay as they are."""
        return self.crop is None and not self.flip and not self.quarter_turns

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
        if self.idle:
            return stacks
        draw = self._draw(stacks[0].shape[-2:], epoch, index)
        treated = (np.ascontiguousarray(self._view(stack, draw)) for stack in stacks)
        return tuple(treated)  # pyright: ignore[reportReturnType]

    def view(self, stack: Stack, epoch: int, index: int) -> Stack:
        """Treat an array ``(..., H, W)`` without copying it."""
        return stack if self.idle else self._view(stack, self._draw(stack.shape[-2:], epoch, index))

    def affine(self, size: tuple[int, int], epoch: int, index: int) -> Affine:
        """Return where in an image of ``size`` the treated pixels lie, for devices that gather them."""
        # A view differs from its base in nothing but where it starts and how it steps: read that off one.
        base = np.empty(size, np.int8)
        view = self.view(base, epoch, index)
        down, right = view.strides
        return Affine(view.ctypes.data - base.ctypes.data, down, right)

    def _draw(self, size: tuple[int, ...], epoch: int, index: int) -> _Draw:
        rng = np.random.default_rng((self.seed, epoch, index))
        parts = self.crop or size
        # Every number is drawn in any case: switching one option must not change what another one does.
        top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(size, parts, strict=True))
        flip_rows, flip_columns = (bool(draw) for draw in rng.integers(0, 2, size=2))
        return _Draw(top, left, flip_rows, flip_columns, int(rng.integers(0, 4)))

    def _view(self, stack: Any, draw: _Draw) -> Any:
        height, width = self.crop or stack.shape[-2:]
        view = stack[..., draw.top : draw.top + height, draw.left : draw.left + width]
        if self.flip and draw.flip_rows:
            view = view[..., ::-1, :]
        if self.flip and draw.flip_columns:
            view = view[..., ::-1]
        if self.quarter_turns:
            view = np.rot90(view, draw.turns, axes=(-2, -1))
        return view
