"""Read the Finnish Meteorological Institute's composites: PGM images, gzipped or not, with comments."""

from __future__ import annotations

import gzip
import re
import zlib
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from spatspark_fast.common import units
from spatspark_fast.data.radar.frames import Crop, Frame, FrameError, Georeference, Source, cut

__all__ = ["FMI", "read_frame", "read_georeference", "read_time"]

_HEADER_LIMIT = 16384  # bytes; a real header has about 750
_NO_ECHO, _NO_DATA = 0, 255


def read_time(path: Path) -> datetime:
    """Read the UTC time from the comment ``# obstime YYYYMMDDHHMM``."""
    return _time(_read_header(path)[0])


def read_frame(path: Path, crop: Crop | None = None) -> Frame:
    """Read the image as mm per 5 min: ``dBZ = (PV - 64) / 2``, then the relation ``fmi``.

    Raises:
        FrameError: no 8-bit binary PGM, truncated, or not corrected reflectivity.
    """
    comments, (columns, rows), data = _read_header(path, with_data=True)
    quantity = comments.get("param", "")
    if quantity != "CorrectedReflectivity":
        raise FrameError(f"param is {quantity!r}, not CorrectedReflectivity")
    if len(data) != rows * columns:
        raise FrameError(f"{len(data)} bytes of pixels where {rows} rows x {columns} columns were announced")
    pixels = cut(np.frombuffer(data, dtype=np.uint8).reshape(rows, columns), crop)
    level = np.arange(256)
    rate = np.where(level == _NO_ECHO, 0.0, units.dbz_to_mm_per_hour((level - 64.0) / 2.0, "fmi"))
    depth = units.mm_per_hour_to_mm_per_5min(rate)[pixels]
    return Frame.from_depth(_time(comments), depth, pixels != _NO_DATA, (rows, columns))


def read_georeference(path: Path) -> Georeference:
    """Read the projection from the comments; only FMI's stereographic one is known, else it stays empty."""
    comments, (_, rows), _ = _read_header(path)
    if comments.get("type") != "stereographic":
        return Georeference()
    try:
        size_x, size_y = float(comments["metersperpixel_x"]), float(comments["metersperpixel_y"])
        # The sphere and the false origin are not in the files; pysteps' importer has them. They put the lower
        # left corner of the image at (0, 0).
        projection = (
            f"+proj=stere +lon_0={comments['centrallongitude']}E +lat_0={comments['centrallatitude']}N "
            f"+lat_ts={comments['truelatitude']} +a=6371288 +x_0=380886.310 +y_0=3395677.920 +no_defs"
        )
    except (KeyError, ValueError):
        return Georeference()
    return Georeference(projection, "m", size_x, -size_y, x_left=0.0, y_top=rows * size_y)


FMI = Source(
    name="fmi",
    suffixes=(".pgm.gz", ".pgm"),
    read_time=read_time,
    read=read_frame,
    georeference=read_georeference,
    licence="FMI open data, CC BY 4.0; cite the Finnish Meteorological Institute",
)


def _read_header(path: Path, with_data: bool = False) -> tuple[dict[str, str], tuple[int, int], bytes]:
    """Return the comments, the size (columns, rows) and, if asked for, the bytes of the pixels."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            # GzipFile reads like the file it wraps, but is no BinaryIO to the type checker.
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
            comments, size = _parse_header(file)
            return comments, size, file.read() if with_data else b""
    except (OSError, EOFError, zlib.error) as error:
        raise FrameError(f"not a readable PGM file: {error}") from error


def _parse_header(file: BinaryIO) -> tuple[dict[str, str], tuple[int, int]]:
    if file.readline(_HEADER_LIMIT).strip() != b"P5":
        raise FrameError("not a binary PGM image (P5)")
    comments: dict[str, str] = {}
    numbers: list[int] = []
    read = 0
    while len(numbers) < 3:
        line = file.readline(_HEADER_LIMIT)
        read += len(line)
        if not line or read > _HEADER_LIMIT:
            raise FrameError("the PGM header has no size and no largest value")
        text = line.decode("latin-1").strip()
        if text.startswith("#"):
            key, _, value = text[1:].strip().partition(" ")
            comments[key] = value.strip()
        elif re.fullmatch(r"[\d\s]+", text):
            numbers += [int(number) for number in text.split()]
        else:
            raise FrameError(f"unexpected line {text[:40]!r} in the PGM header")
    if len(numbers) != 3 or numbers[2] != 255:
        raise FrameError(f"PGM header {numbers} is not columns, rows and 255 (8 bit)")
    return comments, (numbers[0], numbers[1])


def _time(comments: dict[str, str]) -> datetime:
    text = comments.get("obstime", "")
    try:
        return datetime.strptime(text, "%Y%m%d%H%M")
    except ValueError as error:
        raise FrameError(f"comment obstime is {text!r}, not YYYYMMDDHHMM") from error
