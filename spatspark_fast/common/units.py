"""Hold every physical constant and unit conversion of the project.

Rain is stored as a *depth* in mm per 5 min (what one radar frame accumulates), scored as a *rate* in mm/h,
and fed to models *normalised*: depth divided by the scale of the data set. All functions take a Python
number, a NumPy array or a torch tensor, and give back the same kind.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from spatspark_fast.common.errors import UserError

__all__ = [
    "FRAME_MINUTES",
    "MIN_WET_RATE",
    "NL50_SCALE",
    "SPATSPARK_SCALE",
    "ZR_RELATIONS",
    "ZRelation",
    "check_scale",
    "dbz_to_mm_per_hour",
    "depth_to_mm_per_5min",
    "mm_per_5min_to_mm_per_hour",
    "mm_per_hour",
    "mm_per_hour_to_dbz",
    "mm_per_hour_to_mm_per_5min",
    "normalised",
    "zr_relation",
]

Quantity = TypeVar("Quantity", bound=Any)

LARGEST_SCALE = 1e6
"""Bound of scales: data in nanometres or in kilometres of rain do not exist."""

FRAME_MINUTES = 5.0
"""Length of one radar frame in minutes; a stored depth is the rain of this many minutes."""

_FRAMES_PER_HOUR = 60.0 / FRAME_MINUTES

NL50_SCALE = 47.83
"""Largest depth of the NL-50 data in mm per 5 min, by which SmaAt-UNet's files are divided."""

SPATSPARK_SCALE = 47.18
"""The scale in mm per 5 min that SpaT-SparK's published scores use for the same files."""

MIN_WET_RATE = 0.1
"""Rate in mm/h above which a pixel counts as wet: just below KNMI's smallest step, 0.01 mm in 5 min."""


def check_scale(scale: object) -> float:
    """Return the mm per 5 min that data value 1 stands for; raise UserError unless it is a sane, positive number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(f"scale_mm_per_5min is {reprlib.repr(scale)}, not a positive number")
    if not 1 / LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise UserError(f"scale_mm_per_5min is {scale:g}, not a positive number up to {LARGEST_SCALE:g}")
    return float(scale)


class ZRelation(NamedTuple):
    """Relate reflectivity and rain: ``Z = a * R ** b``, Z in mm^6/m^3 and R in mm/h."""

    a: float
    b: float


ZR_RELATIONS: Mapping[str, ZRelation] = MappingProxyType(
    {
        # Marshall & Palmer (1948); also KNMI's: R = 10 ** ((PV - 109) / 32) for dBZ = 0.5 * PV - 31.5.
        "marshall_palmer": ZRelation(200.0, 1.6),
        # Leinonen et al. (2012), used for the composites of the Finnish Meteorological Institute.
        "fmi": ZRelation(223.0, 1.53),
        # Joss et al. (1998), behind the 8-bit scale of MeteoSwiss.
        "mch": ZRelation(316.0, 1.5),
    }
)
"""Named Z-R relations."""


def zr_relation(relation: str | ZRelation) -> ZRelation:
    """Return the relation of that name, or the relation itself.

    Raises:
        ValueError: the name is not one of ``ZR_RELATIONS``.
    """
    if isinstance(relation, ZRelation):
        return relation
    if relation not in ZR_RELATIONS:
        raise ValueError(f"unknown Z-R relation {relation!r}; known are {', '.join(sorted(ZR_RELATIONS))}")
    return ZR_RELATIONS[relation]


def mm_per_5min_to_mm_per_hour(depth: Quantity) -> Quantity:
    """Convert a depth in mm per 5 min into a rate in mm/h (12 times as much)."""
    return depth * _FRAMES_PER_HOUR


def mm_per_hour_to_mm_per_5min(rate: Quantity) -> Quantity:
    """Convert a rate in mm/h into a depth in mm per 5 min (a twelfth)."""
    return rate / _FRAMES_PER_HOUR


def depth_to_mm_per_5min(depth: Quantity, minutes: float) -> Quantity:
    """Convert a depth in mm accumulated over ``minutes`` into the mean depth in mm per 5 min.

    Raises:
        ValueError: ``minutes`` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"an accumulation needs a positive duration, got minutes={minutes}")
    return depth * (FRAME_MINUTES / minutes)


def mm_per_hour(value: Quantity, scale: float = NL50_SCALE) -> Quantity:
    """Convert a normalised value (depth / ``scale``, ``scale`` in mm per 5 min) into a rate in mm/h."""
    return value * (scale * _FRAMES_PER_HOUR)


def normalised(rate: Quantity, scale: float = NL50_SCALE) -> Quantity:
    """Convert a rate in mm/h into a normalised value (depth / ``scale``, ``scale`` in mm per 5 min)."""
    return rate / (scale * _FRAMES_PER_HOUR)


def dbz_to_mm_per_hour(dbz: Quantity, relation: str | ZRelation = "marshall_palmer") -> Quantity:
    """Convert a reflectivity in dBZ into a rate in mm/h: ``R = (10 ** (dBZ / 10) / a) ** (1 / b)``."""
    a, b = zr_relation(relation)
    return 10.0 ** ((dbz - 10.0 * math.log10(a)) / (10.0 * b))


def mm_per_hour_to_dbz(rate: float, relation: str | ZRelation = "marshall_palmer") -> float:
    """Convert one rate in mm/h into a reflectivity in dBZ; no rain is minus infinity."""
    a, b = zr_relation(relation)
    if rate < 0:
        raise ValueError(f"a rain rate cannot be negative, got {rate} mm/h")
    return 10.0 * math.log10(a) + 10.0 * b * math.log10(rate) if rate > 0 else -math.inf
