"""Read MeteoSwiss' 8-bit GIF images of 5-minute rain (products AQC and CPC)."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from spatspark_fast.common.units import zr_relation
from spatspark_fast.data.radar.frames import Crop, Frame, FrameError, Georeference, Source, cut

__all__ = ["MCH", "read_frame", "read_georeference", "read_time"]

_PRODUCTS = ("AQC", "CPC")
_NO_DATA = 255
_NAME = re.compile(r"([A-Z]{3})(\d{2})(\d{3})(\d{2})(\d{2})")


def read_time(path: Path) -> datetime:
    """Read the UTC time from the comment in the file (``PRDT=AQCyyjjjHHMM``), or else from its name."""
    try:
        with Image.open(path) as image:
            return _time(path, image)
    except (UnidentifiedImageError, OSError) as error:
        raise FrameError(f"not a GIF image: {error}") from error


def read_frame(path: Path, crop: Crop | None = None) -> Frame:
    """Read the image as mm per 5 min, by the palette *index*; index 255 is no data.

    Raises:
        FrameError: not a palette GIF, truncated, or a product on another scale.
    """
    try:
        with Image.open(path) as image:
            time = _time(path, image)
            if image.format != "GIF" or image.mode not in ("P", "L"):
                raise FrameError(f"{image.format} image of mode {image.mode}, not a GIF with a palette")
            whole = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise FrameError(f"not a readable GIF image: {error}") from error
    index = cut(whole, crop)
    return Frame.from_depth(time, _depth_of_index()[index], index != _NO_DATA, whole.shape)


def read_georeference(path: Path) -> Georeference:
    """Give the Swiss grid CH1903 (EPSG:21781) of MeteoSwiss' composites; the files do not hold it."""
    del path
    return Georeference(
        projection="+proj=somerc +lat_0=46.95240555555556 +lon_0=7.439583333333333 +k_0=1 +x_0=600000 "
        "+y_0=200000 +ellps=bessel +towgs84=674.374,15.056,405.346,0,0,0,0 +units=m +no_defs",
        unit="m",
        pixel_size_x=1000.0,
        pixel_size_y=-1000.0,
        x_left=255000.0,
        y_top=480000.0,
    )


MCH = Source(
    name="mch",
    suffixes=(".gif",),
    read_time=read_time,
    read=read_frame,
    georeference=read_georeference,
    licence='MeteoSwiss open data; cite "Source: MeteoSwiss"',
)


def _depth_of_index() -> NDArray[np.float64]:
    """Return the depth in mm per 5 min of each palette index (as pysteps' ``import_mch_gif`` has it)."""
    a, b = zr_relation("mch")
    index = np.arange(256)
    depth = (10.0 ** ((index - 71.5) / 20.0) / a) ** (1.0 / b)
    return np.where((index < 2) | (index > 250), 0.0, depth)


def _time(path: Path, image: Image.Image) -> datetime:
    comment = image.info.get("comment", b"")
    comment = comment.decode("latin-1") if isinstance(comment, bytes) else str(comment)
    inside = re.search(rf"PRDT=({_NAME.pattern})", comment)
    match = _NAME.match(inside.group(1) if inside else path.name)
    if match is None:
        raise FrameError("neither the GIF comment nor the file name holds a time like AQC151351545")
    product, year, day, hour, minute = match.groups()
    if product not in _PRODUCTS:
        raise FrameError(f"product {product} is not on the 8-bit rain scale of {' and '.join(_PRODUCTS)}")
    try:
        start = datetime(2000 + int(year), 1, 1, int(hour), int(minute))
    except ValueError as error:
        raise FrameError(f"no such time: {match.group(0)}") from error
    return start + timedelta(days=int(day) - 1)
