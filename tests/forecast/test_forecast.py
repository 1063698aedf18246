"""Forecasts: the right frames, a NetCDF that others can read, and the rain where it belongs on the earth."""

from datetime import datetime, timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from PIL import Image, ImageSequence

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.plots import save_figure
from spatspark_fast.data.radar.frames import Georeference
from spatspark_fast.data.radar.knmi import KNMI
from spatspark_fast.forecast.netcdf import forecast_dataset, metric_place, write_netcdf
from spatspark_fast.forecast.pictures import forecast_figure, write_animation
from spatspark_fast.forecast.predictors import ModelPredictor
from spatspark_fast.forecast.result import Forecast, make_forecast
from spatspark_fast.forecast.starts import Selection, Start, read_starts
from tests.forecast.forecasts import START, Shift, loaded, moving_rain, write_windows
from tests.prepare.archives import START as ARCHIVE_START
from tests.prepare.archives import rain_pixels, write_archive

WHOLE = Selection(crop="all")


def stereographic() -> Georeference:
    """Return the place of KNMI's NL-50 crop, in km as its files have it."""
    projection = "+proj=stere +lat_0=90 +lon_0=0.0 +lat_ts=60.0 +a=6378.137 +b=6356.752 +x_0=0 +y_0=0"
    return Georeference(projection, "km", 1.0, -1.0, 225.0, -3932.0)


def made(start: Start | None = None) -> Forecast:
    times = [START + timedelta(minutes=5 * step) for step in range(4)]
    rates = moving_rain(1, 4, 32, 48)[0]
    rates[:, :4] = np.nan
    start = start or Start(rates, times, stereographic(), "20200601T1215Z", "a test", "nobody's")
    return make_forecast(ModelPredictor(loaded(Shift())), start, 3)


def test_netcdf_is_what_xarray_and_cf_expect(tmp_path: Path) -> None:
    forecast = made()
    write_netcdf(forecast, tmp_path / "f.nc")
    with xr.open_dataset(tmp_path / "f.nc") as data:
        rate = data["rainfall_rate"]
        assert rate.dims == ("time", "y", "x")
        assert rate.attrs["units"] == "mm h-1"
        assert rate.attrs["standard_name"] == "rainfall_rate"
        assert rate.attrs["grid_mapping"] == "crs"
        assert np.array_equal(rate.values, forecast.rates, equal_nan=True)
        assert np.isnan(rate.values[:, :4]).all()
        assert data.attrs["Conventions"].startswith("CF-")
        expected = [np.datetime64(START + timedelta(minutes=15 + 5 * step), "ns") for step in (1, 2, 3)]
        assert data["time"].values.tolist() == np.array(expected).tolist()
        assert data["forecast_reference_time"].values == np.datetime64(START + timedelta(minutes=15), "ns")
        minutes = data["lead_time"].values
        if np.issubdtype(minutes.dtype, np.timedelta64):  # older xarray decodes it
            minutes = minutes / np.timedelta64(1, "m")
        assert minutes.tolist() == [5, 10, 15]
        assert data["x"].attrs["standard_name"] == "projection_x_coordinate"
        assert data["x"].values[:2].tolist() == [225500.0, 226500.0]
        assert data["y"].values[:2].tolist() == [-3932500.0, -3933500.0]
        assert "+a=6378137" in data["crs"].attrs["proj4_params"]


def test_pixels_lie_where_they_do_on_the_earth(radar: Path) -> None:
    pytest.importorskip("pyproj", reason='no pyproj: pip install "spatspark-fast[radar]"')
    path = sorted((radar / "knmi_201008").glob("*.h5"))[0]
    frame = KNMI.read(path, None)
    start = Start(np.stack([frame.rain * 12] * 4), None, KNMI.georeference(path), "x", "knmi")
    data = forecast_dataset(made(start))
    with h5py.File(path) as file:
        # Longitude and latitude of the outer corners: lower left, upper left, upper right, lower right.
        corners = np.asarray(file["geographic"].attrs["geo_product_corners"]).reshape(4, 2)
    ours = [(data.longitude.values[i, j], data.latitude.values[i, j]) for i, j in ((-1, 0), (0, 0), (0, -1), (-1, -1))]
    # The centre of a corner pixel is 0.7 km from its corner.
    assert np.abs(np.array(ours) - corners).max() < 0.012
    assert data["crs"].attrs["grid_mapping_name"] == "polar_stereographic"


def test_without_times_or_place_it_says_what_it_knows(tmp_path: Path) -> None:
    forecast = made(Start(moving_rain(1, 4, 16, 16)[0], None, Georeference(), "window00003", "somewhere"))
    write_netcdf(forecast, tmp_path / "f.nc")
    with xr.open_dataset(tmp_path / "f.nc") as data:
        assert data["rainfall_rate"].dims == ("lead_time", "y", "x")
        assert "crs" not in data.variables
        assert data["y"].attrs["long_name"].startswith("row")
    assert forecast.valid_times is None
    with pytest.raises(UserError, match="cannot write"):
        write_netcdf(forecast, tmp_path / "no" / "f.nc")


def test_kilometres_become_metres_in_the_projection_too() -> None:
    where = metric_place(stereographic())
    assert where.unit == "m"
    assert (where.x_left, where.y_top, where.pixel_size_y) == (225000.0, -3932000.0, -1000.0)
    assert "+lat_ts=60.0 +a=6378137 +b=6356752 +x_0=0" in where.projection
    assert metric_place(where) is where


def test_pictures_have_content_and_every_frame(tmp_path: Path) -> None:
    forecast = made()
    write_animation(forecast, tmp_path / "f.gif")
    save_figure(forecast_figure(forecast), tmp_path / "f.png")
    with Image.open(tmp_path / "f.gif") as image:
        assert len(list(ImageSequence.Iterator(image))) == 4 + 3
        shown = []
        for index in (0, 3, 6):
            image.seek(index)
            shown.append(np.asarray(image.convert("RGB")))
    assert all(len(np.unique(one.reshape(-1, 3), axis=0)) > 8 for one in shown)
    assert (shown[0] != shown[1]).any()
    assert (shown[1] != shown[2]).any()
    with Image.open(tmp_path / "f.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 15


def test_windows_of_a_file(tmp_path: Path) -> None:
    rates = moving_rain(3, 7, 16, 24)
    missing = np.zeros(rates.shape, bool)
    missing[:, :, :2] = True
    file = write_windows(tmp_path / "w.h5", rates, scale=20.0, missing=missing)
    newest = next(read_starts(file, 4, Selection()))
    assert newest.times == [START + timedelta(hours=2, minutes=5 * step) for step in (3, 4, 5, 6)]
    assert np.isnan(newest.rates[:, :2]).all()
    assert np.allclose(newest.rates[:, 2:], rates[2, 3:, 2:], atol=1e-4)
    every = list(read_starts(file, 4, Selection("every")))
    assert [start.label for start in every] == ["20200601T1215Z", "20200601T1315Z", "20200601T1415Z"]
    assert np.allclose(every[1].rates[:, 2:], rates[1, :4, 2:], atol=1e-4)
    chosen = next(read_starts(file, 4, Selection(START + timedelta(hours=1, minutes=20))))
    assert np.allclose(chosen.rates[:, 2:], rates[1, 1:5, 2:], atol=1e-4)
    with pytest.raises(UserError, match="no window has 4 frames that end at 2020-06-01 12:10"):
        next(read_starts(file, 4, Selection(START + timedelta(minutes=10))))
    with pytest.raises(UserError, match="7 frames"):
        next(read_starts(file, 8, Selection()))


def test_a_file_without_times_and_one_with_a_gap(tmp_path: Path) -> None:
    file = write_windows(tmp_path / "w.h5", moving_rain(2, 6, 16, 16))
    with h5py.File(file, "a") as content:
        stamps = np.asarray(content["test/timestamps"])
        stamps[1, 5] = stamps[1, 5][0].replace(b";13:25", b";13:40")
        del content["test/timestamps"]
        content["test/timestamps"] = stamps
    with pytest.raises(UserError, match=r"window 1: between 2020-06-01 13:20:00 and .* 13:40:00 UTC lie 20 min"):
        next(read_starts(file, 4, Selection()))
    assert len(list(read_starts(file, 4, Selection("every")))) == 2  # the gap is not among their frames
    with h5py.File(file, "a") as content:
        del content["test/timestamps"]
    start = next(read_starts(file, 4, Selection()))
    assert (start.times, start.label) == (None, "window00001")


def test_raw_files_in_a_folder(tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "a", list(range(9)))
    (folder / "readme.txt").touch()
    start = next(read_starts(folder, 4, WHOLE))
    assert start.times == [ARCHIVE_START + timedelta(minutes=5 * step) for step in (5, 6, 7, 8)]
    assert np.allclose(start.rates[-1], rain_pixels(8) * 0.12, atol=1e-4)
    assert start.where.unit == "km"
    cropped = next(read_starts(folder, 4, Selection(ARCHIVE_START + timedelta(minutes=20), crop="8:24,4:20")))
    assert np.allclose(cropped.rates[-1], rain_pixels(4)[8:24, 4:20] * 0.12, atol=1e-4)
    assert (cropped.where.x_left, cropped.where.y_top) == (4.0, -3650.0 - 8.0)
    every = list(read_starts(folder, 4, Selection("every", crop="all", stride=2)))
    assert [start.times[-1].minute for start in every if start.times] == [15, 25, 35]


def test_gaps_and_unreadable_files(tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "a", [0, 1, 2, 3, 4, 7, 8])
    with pytest.raises(UserError, match="lie 15 minutes, not 5"):
        next(read_starts(folder, 4, WHOLE))
    every = list(read_starts(folder, 4, Selection("every", crop="all")))
    assert [start.times[-1].minute for start in every if start.times] == [15, 20]
    with pytest.raises(UserError, match="no 6 of the 7 frames"):
        list(read_starts(folder, 6, Selection("every", crop="all")))
    with pytest.raises(UserError, match="holds 7 frames"):
        next(read_starts(folder, 8, WHOLE))
    with pytest.raises(UserError, match="no frame of 2016-07-01 00:25:00"):
        next(read_starts(folder, 4, Selection(datetime(2016, 7, 1, 0, 25), crop="all")))
    broken = write_archive(tmp_path / "b", [0])
    for path in broken.iterdir():
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="none of the 1 files"):
        next(read_starts(broken, 1, WHOLE))
    with pytest.raises(UserError, match="say by --source"):
        next(read_starts(tmp_path, 1, Selection())) if not (tmp_path / "x.gif").touch() else None


def test_real_radar_of_three_countries(radar: Path, tmp_path: Path) -> None:
    places = {"knmi_201008": (55, 48), "mch_20160711": (50, 43), "fmi_pgm_20160928": (70, 57)}
    for folder, (north, south) in places.items():
        start = next(read_starts(radar / folder, 12, Selection()))
        assert start.rates.shape == (12, 288, 288)
        assert np.nanmax(start.rates) < 200
        forecast = make_forecast(ModelPredictor(loaded(Shift(12, 12))), start, 12)
        write_netcdf(forecast, tmp_path / f"{folder}.nc")
        with xr.open_dataset(tmp_path / f"{folder}.nc") as data:
            assert start.times is not None
            assert data["time"].values[-1] == np.datetime64(start.times[-1] + timedelta(hours=1), "ns")
            if "latitude" in data:
                assert south < data["latitude"].values.min() < data["latitude"].values.max() < north
