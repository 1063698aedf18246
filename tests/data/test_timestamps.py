"""KNMI's timestamps are read in all their spellings and written in one."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.radar.pysteps import time_from_name
from spatspark_fast.data.radar.timestamps import format_timestamp, parse_time, parse_timestamp


@given(st.datetimes(datetime(1000, 1, 1), datetime(9999, 12, 31)))
def test_round_trip_to_the_millisecond(time: datetime) -> None:
    time = time.replace(microsecond=time.microsecond // 1000 * 1000)
    assert parse_timestamp(format_timestamp(time)) == time
    assert len(format_timestamp(time)) == 24


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"26-AUG-2010;00:05:00.000", datetime(2010, 8, 26, 0, 5)),
        ("26-Aug-2010;00:05:00", datetime(2010, 8, 26, 0, 5)),
        ("26-AUG-2010;00:04:60.000", datetime(2010, 8, 26, 0, 5)),
        ("2010-08-26T00:05:00", datetime(2010, 8, 26, 0, 5)),
        ("2010-08-26T02:05:00+02:00", datetime(2010, 8, 26, 0, 5)),
        ("26-XYZ-2010;00:05:00.000", None),
        ("32-AUG-2010;00:05:00.000", None),
        ("", None),
        ("nan", None),
        (b"\xff\xfe", None),
    ],
)
def test_spellings(text: str | bytes, expected: datetime | None) -> None:
    assert parse_timestamp(text) == expected


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(UserError, match=r"--test_from 'yesterday'"):
        parse_time("yesterday", "--test_from")


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("RAD_201608260005.h5", None, datetime(2016, 8, 26, 0, 5)),
        ("66_20200130_000000.prcp-c5.nc", None, datetime(2020, 1, 30)),
        ("T_PAAH21_C_EUOC_20180824090000.hdf", None, datetime(2018, 8, 24, 9)),
        ("PrecipRate_00.00_20190610-000200.grib2", None, datetime(2019, 6, 10, 0, 2)),
        ("AQC151351545F_00005.801.gif", "AQC%y%j%H%M", datetime(2015, 5, 15, 15, 45)),
    ],
)
def test_times_in_names(name: str, pattern: str | None, expected: datetime) -> None:
    assert time_from_name(name, pattern) == expected


@pytest.mark.parametrize(("name", "pattern"), [("radar.h5", None), ("r_201699999999.h5", None), ("r1.h5", "%Y")])
def test_a_name_without_time_is_an_error(name: str, pattern: str | None) -> None:
    with pytest.raises(UserError, match="no time"):
        time_from_name(name, pattern)
