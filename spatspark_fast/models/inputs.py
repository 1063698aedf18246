"""What the encoder sees of the rain: data values as they are, or brought to order one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.units import mm_per_hour

__all__ = ["GAIN", "InputScaling", "check_input_scaling", "scale_input"]

InputScaling = Literal["none", "log"]

GAIN = mm_per_hour(1.0)
"""Data value 1 in mm/h at the usual scale of 47.83 mm per 5 min. With another scale it is a gain like any other."""


def scale_input(frames: Tensor, scaling: InputScaling) -> Tensor:
    """Return what the encoder sees of ``frames`` (any shape, data units); dry (0) stays 0.

    ``"none"``: the values themselves, as published; mean rain is about 0.001, and a variance of 1e-6 drowns in the
    1e-5 that a batch norm adds to it. ``"log"``: ``log(1 + R)`` with R in mm/h, which is 0.1 for drizzle and 3 for a
    thunderstorm; negative values, which no radar gives, count as dry.
    """
    return frames if scaling == "none" else (frames.clamp(min=0) * GAIN).log1p()


def check_input_scaling(scaling: str) -> None:
    """Raise UserError unless ``scaling`` exists."""
    if scaling not in get_args(InputScaling):
        raise UserError(f"input_scaling must be one of {', '.join(get_args(InputScaling))}, got {scaling!r}")
