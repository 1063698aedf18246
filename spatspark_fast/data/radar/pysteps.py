"""Read every other format that pysteps knows, through pysteps' importers (extra ``radar``).

pysteps is imported only here, and only when one of its importers is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.radar.frames import Crop, Frame, FrameError, Georeference, Source, cut

__all__ = ["pysteps_source", "time_from_name"]

_DIRECTIVES = {"%Y": r"\d{4}", "%m": r"\d{2}", "%d": r"\d{2}", "%H": r"\d{2}", "%M": r"\d{2}", "%S": r"\d{2}"}
_DIRECTIVES |= {"%y": r"\d{2}", "%j": r"\d{3}"}
_COMMON = tuple(f"%Y%m%d{between}%H%M{seconds}" for seconds in ("%S", "") for between in ("", "_", "-", "T", ".", "-T"))


def time_from_name(name: str, pattern: str | None = None) -> datetime:
    """Find a UTC time in a file name, by a strptime ``pattern`` or by the usual ways to write one.

    Raises:
        FrameError: there is none.
    """
    for candidate in (pattern,) if pattern else _COMMON:
        expression = re.sub(
            r"%[A-Za-z]|.",
            lambda part: _DIRECTIVES.get(part.group(0), re.escape(part.group(0))),
            candidate,
        )
        # Digits on either side would make it a part of a longer number, unless the user says the pattern.
        expression = expression if pattern else rf"(?<!\d){expression}(?!\d)"
        for match in re.finditer(expression, name):
            with contextlib.suppress(ValueError):
                return datetime.strptime(match.group(0), candidate)
    wanted = f"like {pattern!r}" if pattern else "like 201501312355; give --time_format"
    raise FrameError(f"no time {wanted} in the name {name!r}")


def pysteps_source(name: str, options: Mapping[str, Any], time_format: str | None = None) -> Source:
    """Make a source of pysteps' importer ``name``; ``options`` are passed to it.

    Raises:
        UserError: pysteps is not installed, or has no such importer.
    """
    _importer(name)
    return Source(
        name=name,
        suffixes=("",),
        read_time=partial(_read_time, time_format=time_format),
        read=partial(_read_frame, importer=name, options=dict(options), time_format=time_format),
        georeference=partial(_read_georeference, importer=name, options=dict(options)),
        licence="that of the provider",
        options=dict(options),
    )


def _importer(name: str) -> Callable[..., tuple]:
    # pysteps says on import where its configuration is; that is not the output of our command.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            interface = importlib.import_module("pysteps.io.interface")
        except ImportError as error:
            raise UserError(
                f"--source {name} is read by pysteps, which cannot be imported ({error}); "
                f'pip install "spatspark-fast[radar]", or use knmi, mch or fmi'
            ) from error
    try:
        return interface.get_method(name, "importer")
    except ValueError as error:
        known = sorted(getattr(interface, "_importer_methods", {}))
        raise UserError(
            f"--source {name!r} is unknown; known are knmi, mch, fmi, and pysteps' {', '.join(known)}"
        ) from error


def _import(path: Path, importer: str, options: Mapping[str, Any]) -> tuple[NDArray[np.float64], dict[str, Any]]:
    function = _importer(importer)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # Some importers leave their file for the garbage collector to close, or divide by zero.
            warnings.simplefilter("ignore")
            values, _, metadata = function(str(path), **options)
    except Exception as error:  # a third party's readers raise whatever their libraries do
        raise FrameError(f"pysteps' {importer} cannot read it: {type(error).__name__}: {error}") from error
    values = np.ma.filled(np.ma.asarray(values, dtype=np.float64), np.nan)
    if values.ndim != 2:
        raise FrameError(f"pysteps' {importer} gives an array of shape {values.shape}, not an image")
    # Our row 0 is north, as pysteps' is where yorigin is "upper".
    return (values[::-1] if metadata.get("yorigin") == "lower" else values), metadata


def _read_time(path: Path, time_format: str | None) -> datetime:
    return time_from_name(path.name, time_format)


def _read_frame(
    path: Path, crop: Crop | None, *, importer: str, options: Mapping[str, Any], time_format: str | None
) -> Frame:
    time = time_from_name(path.name, time_format)
    whole, metadata = _import(path, importer, options)
    values = cut(whole, crop)
    return Frame.from_depth(time, _depth(values, metadata), np.isfinite(values), whole.shape)


def _depth(values: NDArray[np.float64], metadata: Mapping[str, Any]) -> NDArray[np.float64]:
    """Convert what pysteps gives, in the unit that it names, into mm per 5 min."""
    unit = str(metadata.get("unit", ""))
    if unit == "mm/h":
        return units.mm_per_hour_to_mm_per_5min(values)
    if unit in ("mm", "kg m-2", "kg/m2", "kg/m^2"):
        minutes = float(metadata.get("accutime") or 0.0)
        if minutes <= 0:
            raise FrameError(f"unit {unit} without an accumulation time")
        return units.depth_to_mm_per_5min(values, minutes)
    if unit == "dBZ":
        relation: str | units.ZRelation = "marshall_palmer"
        if metadata.get("zr_a") and metadata.get("zr_b"):
            relation = units.ZRelation(float(metadata["zr_a"]), float(metadata["zr_b"]))
        depth = units.mm_per_hour_to_mm_per_5min(units.dbz_to_mm_per_hour(values, relation))
        # The zero value is the smallest value of *this* image: no echo only where it is also no rain.
        zero = min(float(metadata.get("zerovalue", -np.inf)), 0.0)
        return np.where(values <= zero, 0.0, depth)
    raise FrameError(f"unit {unit!r} is none of mm/h, mm, dBZ")


def _read_georeference(path: Path, importer: str, options: Mapping[str, Any]) -> Georeference:
    _, metadata = _import(path, importer, options)

    def number(key: str) -> float:
        return float(metadata.get(key, np.nan))

    return Georeference(
        projection=str(metadata.get("projection", "")),
        unit=str(metadata.get("cartesian_unit", "m")),
        pixel_size_x=number("xpixelsize"),
        pixel_size_y=-abs(number("ypixelsize")),
        x_left=number("x1"),
        y_top=number("y2"),
    )
