"""Write small radar files for tests, in every spelling that is met in the wild."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
START = datetime(2016, 7, 1)


def stamp(time: datetime) -> str:
    """Write a time as KNMI does, independently of the code under test."""
    return f"{time.day:02d}-{MONTHS[time.month - 1]}-{time.year};{time:%H:%M:%S}.000"


def rain_pixels(index: int, shape: tuple[int, int] = (48, 40), wet: float = 0.7) -> np.ndarray:
    """Return pixel values, a share ``wet`` of them above zero; another image for each index."""
    rng = np.random.default_rng(index)
    return np.where(rng.random(shape) < wet, rng.integers(1, 300, shape), 0).astype(np.uint16)


def write_knmi(
    path: Path,
    end: datetime,
    pixels: np.ndarray,
    formula: str = "GEO=0.01*PV+0.0",
    missing: int | None = 65535,
    outside: int | None = 65535,
    quantity: str = "ACCUMULATED_PRECIPITATION_[MM]",
    minutes: float | None = 5.0,
    style: str = "bytes",
) -> Path:
    """Write one file in KNMI's layout; ``style`` says how strings and numbers are stored as attributes."""

    def text(value: str) -> Any:
        return {"bytes": np.bytes_(value), "str": value, "array": np.array([value.encode()])}[style]

    def number(value: float) -> Any:
        return np.array([value], dtype=np.float32) if style == "array" else np.float32(value)

    with h5py.File(path, "w") as file:
        overview = file.create_group("overview")
        overview.attrs["product_datetime_end"] = text(stamp(end))
        if minutes is not None:
            overview.attrs["product_datetime_start"] = text(stamp(end - timedelta(minutes=minutes)))
        image = file.create_group("image1")
        image.attrs["image_geo_parameter"] = text(quantity)
        image.create_dataset("image_data", data=pixels, compression="gzip")
        calibration = image.create_group("calibration")
        calibration.attrs["calibration_formulas"] = text(formula)
        if missing is not None:
            calibration.attrs["calibration_missing_data"] = np.array([missing], dtype=np.int32)
        if outside is not None:
            calibration.attrs["calibration_out_of_image"] = np.int32(outside)
        where = file.create_group("geographic")
        where.attrs["geo_pixel_size_x"] = number(1.0)
        where.attrs["geo_pixel_size_y"] = number(-1.0)
        where.attrs["geo_column_offset"] = number(0.0)
        where.attrs["geo_row_offset"] = number(3650.0)
        projection = where.create_group("map_projection")
        projection.attrs["projection_proj4_params"] = text("+proj=stere +lat_0=90 +x_0=0 y_0=0")
    return path


def write_archive(folder: Path, steps: list[int], shape: tuple[int, int] = (48, 40), wet: float = 0.7) -> Path:
    """Write a KNMI file for each step of 5 minutes after ``START``; the names do not tell the time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        name = f"RAD_NL25_{(number * 37) % 1009:04d}.h5"
        write_knmi(folder / name, START + timedelta(minutes=5 * step), rain_pixels(step, shape, wet))
    return folder
