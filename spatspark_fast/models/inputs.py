"""What the encoder sees of the rain: data values as they are, or brought to order one."""

from __future__ import annotations

from torch import Tensor

from spatspark_fast.common.units import mm_per_hour
from spatspark_fast.models.choices import InputScaling

__all__ = ["GAIN", "scale_input"]

GAIN = mm_per_hour(1.0)
"""Data value 1 in mm/h at the usual scale of 47.83 mm per 5 min. With another scale it is merely a constant factor."""


def scale_input(frames: Tensor, scaling: InputScaling) -> Tensor:
    """Return what the encoder sees of ``frames`` (any shape, data units); dry (0) stays 0.

    ``"none"``: the values themselves, as published; mean rain is about 0.001, and a variance of 1e-6 drowns in the
    1e-5 that a batch norm adds to it. ``"log"``: ``log(1 + R)`` with R in mm/h, which is 0.1 for drizzle and 3 for a
    thunderstorm; negative values, which no radar gives, count as dry.
    """
    return frames if scaling == "none" else (frames.clamp(min=0) * GAIN).log1p()
