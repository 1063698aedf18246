"""Write a forecast as NetCDF with the names of the CF conventions, so that xarray, GIS and web viewers know it."""

from __future__ import annotations

import importlib
import math
import re
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from spatspark_fast import __version__
from spatspark_fast.common.files import atomic_path
from spatspark_fast.data.radar.frames import Georeference
from spatspark_fast.forecast.result import Forecast

if TYPE_CHECKING:
    from pyproj import CRS

__all__ = ["forecast_dataset", "metric_place", "write_netcdf"]

_LENGTHS = re.compile(r"(\+(?:a|b|x_0|y_0)=)(-?[\d.]+)")  # parameters of a projection that are lengths


def metric_place(where: Georeference) -> Georeference:
    """Return the place in metres: KNMI gives km, also for the axes of the earth in the projection itself."""
    if where.unit != "km":
        return where
    projection = _LENGTHS.sub(lambda part: f"{part[1]}{float(part[2]) * 1000:.10g}", where.projection)
    numbers = (where.pixel_size_x, where.pixel_size_y, where.x_left, where.y_top)
    return Georeference(projection, "m", *(1000 * number for number in numbers))


def forecast_dataset(forecast: Forecast) -> xr.Dataset:
    """Return ``rainfall_rate`` ``(time, y, x)`` float32 in mm h-1 with its coordinates.

    ``time`` is the end of each forecast frame (UTC), or the lead time where the input has no times;
    ``forecast_reference_time`` the end of the newest input frame, ``lead_time`` in minutes. ``x`` and ``y`` are
    coordinates of the projection at the centres of the pixels where the source has one, else numbers of columns and
    rows. ``latitude`` and ``longitude`` are added where pyproj is installed.
    """
    start = forecast.start
    where = metric_place(start.where)
    placed = bool(where.projection) and not math.isnan(where.x_left + where.y_top + where.pixel_size_x)
    coordinates = _time_coordinates(forecast)
    coordinates |= _placed_axes(where, forecast.rates.shape[1:]) if placed else _plain_axes(forecast.rates.shape[1:])
    rate = {
        "standard_name": "rainfall_rate",
        "long_name": "forecast rain rate, mean of the minutes up to time",
        "units": "mm h-1",
        "cell_methods": "time: mean",
    }
    if placed:
        rate["grid_mapping"] = "crs"
    dimension = "time" if forecast.valid_times else "lead_time"
    data = {"rainfall_rate": ((dimension, "y", "x"), forecast.rates, rate)}
    made = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    attributes = {
        "Conventions": "CF-1.10",
        "title": "Rain nowcast",
        "source": f"spatspark-fast {__version__}, model {forecast.model}, from {start.origin}",
        "history": f"{made} forecast by spatspark-fast {__version__}",
        "comment": "No data (NaN) where no radar saw anything in the frames that the model reads.",
        "licence": start.licence,
    }
    dataset = xr.Dataset(data, coordinates, attributes)
    return dataset.assign(crs=((), np.int32(0), _grid_mapping(where))) if placed else dataset


def write_netcdf(forecast: Forecast, path: Path) -> None:
    """Write the data set compressed, completely or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    squeeze = {"zlib": True, "complevel": 4}
    packing: dict[str, dict[str, Any]] = {"rainfall_rate": {**squeeze, "_FillValue": np.float32(np.nan)}}
    dataset = forecast_dataset(forecast)
    for name in (*dataset.coords, "crs"):
        if name in dataset.variables:
            packing[str(name)] = {"_FillValue": None, **(squeeze if dataset[name].ndim == 2 else {})}
    for name in ("time", "forecast_reference_time"):
        if name in dataset.coords:
            packing[name] |= {"units": "seconds since 1970-01-01 00:00:00", "dtype": "int64", "calendar": "standard"}
    with atomic_path(path) as temporary:
        dataset.to_netcdf(temporary, engine="netcdf4", encoding=packing)


def _time_coordinates(forecast: Forecast) -> dict[str, Any]:
    minutes = np.array(forecast.lead_minutes)
    about_lead = {"standard_name": "forecast_period", "long_name": "time after the newest frame", "units": "minutes"}
    times, start = forecast.valid_times, forecast.start.times
    if times is None or start is None:
        return {"lead_time": ("lead_time", minutes, about_lead)}
    return {
        "time": ("time", np.array(times, dtype="datetime64[ns]"), {"standard_name": "time", "axis": "T"}),
        "lead_time": ("time", minutes, about_lead),
        "forecast_reference_time": (
            (),
            np.datetime64(start[-1], "ns"),
            {"standard_name": "forecast_reference_time", "long_name": "end of the newest observed frame"},
        ),
    }


def _placed_axes(where: Georeference, shape: tuple[int, ...]) -> dict[str, Any]:
    height, width = shape
    x = where.x_left + (np.arange(width) + 0.5) * where.pixel_size_x
    y = where.y_top + (np.arange(height) + 0.5) * where.pixel_size_y
    axes: dict[str, Any] = {}
    for name, values in (("x", x), ("y", y)):
        about = {"standard_name": f"projection_{name}_coordinate", "units": where.unit, "axis": name.upper()}
        axes[name] = (name, values, about)
    crs = _crs(where.projection)
    if crs is not None:
        from pyproj import Transformer

        transform = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
        longitude, latitude = transform.transform(*np.meshgrid(x, y))
        for name, values, unit in (("latitude", latitude, "degrees_north"), ("longitude", longitude, "degrees_east")):
            axes[name] = (("y", "x"), values.astype(np.float32), {"standard_name": name, "units": unit})
    return axes


def _plain_axes(shape: tuple[int, ...]) -> dict[str, Any]:
    names = (("y", "row, from the top of the image"), ("x", "column"))
    return {
        name: (name, np.arange(length, dtype=np.int32), {"long_name": words, "units": "1"})
        for (name, words), length in zip(names, shape, strict=True)
    }


def _grid_mapping(where: Georeference) -> dict[str, Any]:
    """Describe the projection: by CF's names where pyproj is installed, always by its proj4 text."""
    crs = _crs(where.projection)
    if crs is None:
        return {"proj4_params": where.projection}
    with warnings.catch_warnings():
        # Not all of the Swiss projection has names in CF; crs_wkt holds the whole of it.
        warnings.simplefilter("ignore")
        known = crs.to_cf()
    return {**{key: value for key, value in known.items() if value is not None}, "proj4_params": where.projection}


def _crs(projection: str) -> CRS | None:
    try:
        pyproj = importlib.import_module("pyproj")
    except ImportError:
        return None
    try:
        return pyproj.CRS.from_user_input(projection)
    except pyproj.exceptions.CRSError:
        return None
