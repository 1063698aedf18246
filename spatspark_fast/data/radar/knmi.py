"""Read KNMI's own HDF5 images: rain accumulations (RAP, RAU, RAC) and reflectivities (PCP).

Layout: "KNMI HDF5 Data Format Specification, v3.5" (H. Roozekrans and I. Holleman, IR-2003-05).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common import units
from spatspark_fast.data.radar.frames import Crop, Frame, FrameError, Georeference, Source, cut
from spatspark_fast.data.radar.timestamps import parse_timestamp

__all__ = ["KNMI", "parse_calibration", "read_frame", "read_georeference", "read_time"]

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORMULA = re.compile(rf"GEO=(?:([+-]?{_NUMBER})\*)?PV(?:([+-]{{1,2}})({_NUMBER}))?", re.IGNORECASE)


def parse_calibration(formula: str) -> tuple[float, float]:
    """Read the gain and the offset of ``GEO=0.01*PV+0.0``, ``GEO = 0.5 * PV + -32.0``, ``GEO=PV`` ...

    Raises:
        FrameError: the formula is not linear in PV.
    """
    match = _FORMULA.fullmatch(re.sub(r"\s+", "", formula.strip("\0")))
    if match is None:
        raise FrameError(f"calibration formula {formula!r} is not of the form GEO=a*PV+b")
    gain, signs, offset = match.groups()
    sign = -1.0 if signs and signs.count("-") == 1 else 1.0
    return float(gain or 1.0), sign * float(offset or 0.0)


def read_time(path: Path) -> datetime:
    """Read the end of the interval from ``overview@product_datetime_end``, naive UTC.

    Raises:
        FrameError: no KNMI image, or not one of 5-minute rain or of reflectivity.
    """
    with _open(path) as file:
        return _describe(file).end


def read_frame(path: Path, crop: Crop | None = None) -> Frame:
    """Read the image as mm per 5 min, cropped if asked for.

    A reflectivity becomes rain by Marshall and Palmer's relation, pixel value 0 being no echo.

    Raises:
        FrameError: not HDF5, truncated, another product, or an unknown unit or formula.
    """
    with _open(path) as file:
        product = _describe(file)
        calibration = _group(file, "image1/calibration")
        gain, offset = parse_calibration(_text(calibration, "calibration_formulas"))
        whole = _pixels(file)
        pixels = cut(whole, crop)
        valid = np.ones(pixels.shape, dtype=np.bool_)
        for name in ("calibration_missing_data", "calibration_out_of_image"):
            # The largest value of the type is KNMI's code where a file names none.
            code = _number(calibration, name) if name in calibration.attrs else np.iinfo(pixels.dtype).max
            valid &= pixels != code
    value = gain * pixels.astype(np.float64) + offset
    if product.is_reflectivity:
        depth = units.mm_per_hour_to_mm_per_5min(units.dbz_to_mm_per_hour(value, "marshall_palmer"))
        depth = np.where(pixels == 0, 0.0, depth)
    else:
        depth = units.depth_to_mm_per_5min(value, product.minutes)
    return Frame.from_depth(product.end, depth, valid, whole.shape)


def read_georeference(path: Path) -> Georeference:
    """Read projection, pixel size and offsets; KNMI's projection unit is km."""
    with _open(path) as file:
        where = _group(file, "geographic")
        # One generation of files writes " y_0=0" without the plus sign, which proj takes as a syntax error.
        projection = _text(_group(where, "map_projection"), "projection_proj4_params")
        projection = re.sub(r"(?<=\s)(?=[a-z_0]+=)", "+", projection)
        size_x, size_y = _number(where, "geo_pixel_size_x"), _number(where, "geo_pixel_size_y")
        return Georeference(
            projection=projection,
            unit="km",
            pixel_size_x=size_x,
            pixel_size_y=size_y,
            x_left=_number(where, "geo_column_offset") * size_x,
            y_top=_number(where, "geo_row_offset") * size_y,
        )


KNMI = Source(
    name="knmi",
    suffixes=(".h5", ".hdf5", ".hdf"),
    read_time=read_time,
    read=read_frame,
    georeference=read_georeference,
    licence="KNMI Data Platform, CC BY 4.0; cite KNMI (Royal Netherlands Meteorological Institute)",
    crop=Crop(282, 570, 225, 513),  # the 288 x 288 km of SmaAt-UNet's NL-50 files
)


class _Product(NamedTuple):
    """Say when an image ends, over how many minutes it accumulates, and whether it is in dBZ."""

    end: datetime
    minutes: float
    is_reflectivity: bool


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open a file so that whatever HDF5 finds wrong with it becomes a FrameError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FrameError:
        raise
    except (OSError, KeyError, RuntimeError) as error:
        reason = "not an HDF5 file" if not _is_hdf5(path) else f"damaged HDF5 file: {error}"
        raise FrameError(reason) from error


def _is_hdf5(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n"
    except OSError:
        return False


def _group(parent: h5py.Group, name: str) -> h5py.Group:
    group = parent.get(name)
    if not isinstance(group, h5py.Group):
        raise FrameError(f"no group {name!r}: not a KNMI radar file")
    return group


def _pixels(file: h5py.File) -> NDArray[np.integer]:
    dataset = file.get("image1/image_data")
    if not isinstance(dataset, h5py.Dataset):
        raise FrameError("no data set 'image1/image_data': not a KNMI radar image")
    if dataset.ndim != 2 or dataset.dtype.kind not in "ui":
        raise FrameError(f"image1/image_data is {dataset.dtype} of shape {dataset.shape}, not a 2-D integer image")
    return dataset[()]


def _text(group: h5py.Group, name: str) -> str:
    """Read an attribute written as str, bytes, or an array of one of them."""
    value = _single(group, name)
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return text.strip().strip("\0")


def _number(group: h5py.Group, name: str) -> float:
    value = _single(group, name)
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise FrameError(f"attribute {group.name}@{name} is {value!r}, not a number") from None


def _single(group: h5py.Group, name: str) -> object:
    if name not in group.attrs:
        raise FrameError(f"no attribute {group.name}@{name}")
    value = np.asarray(group.attrs[name])
    if value.size != 1:
        raise FrameError(f"attribute {group.name}@{name} has {value.size} values, not one")
    return value.reshape(-1)[0]


def _time(file: h5py.File, name: str) -> datetime:
    text = _text(_group(file, "overview"), name)
    time = parse_timestamp(text)
    if time is None:
        raise FrameError(f"overview@{name} is {text!r}, not a time")
    return time


def _describe(file: h5py.File) -> _Product:
    quantity = _text(_group(file, "image1"), "image_geo_parameter")
    end = _time(file, "product_datetime_end")
    kind = quantity.upper()
    is_reflectivity = "REFLECTIVITY" in kind and kind.endswith("[DBZ]")
    if not is_reflectivity and not ("PRECIPITATION" in kind and kind.endswith("[MM]")):
        raise FrameError(f"image_geo_parameter {quantity!r} is neither rain in mm nor reflectivity in dBZ")
    minutes = units.FRAME_MINUTES
    if not is_reflectivity and "product_datetime_start" in _group(file, "overview").attrs:
        minutes = (end - _time(file, "product_datetime_start")).total_seconds() / 60.0
    if minutes != units.FRAME_MINUTES:
        raise FrameError(f"accumulated over {minutes:g} minutes, not {units.FRAME_MINUTES:g}: another product")
    return _Product(end, minutes, is_reflectivity)
