"""Read and write KNMI's way of naming a time, ``26-AUG-2010;00:05:00.000`` (UTC)."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from spatspark_fast.common.errors import UserError

__all__ = ["format_timestamp", "parse_time", "parse_timestamp"]

# Not strptime's %b: that one follows the user's locale.
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_TIMESTAMP = re.compile(r"(\d{1,2})-([A-Za-z]{3})-(\d{4});(\d{1,2}):(\d{2}):(\d{2})(?:\.(\d{1,6}))?")


def format_timestamp(time: datetime) -> str:
    """Write a UTC time as in KNMI's files, 24 ASCII characters with milliseconds."""
    day = f"{time.day:02d}-{_MONTHS[time.month - 1]}-{time.year:04d}"
    return f"{day};{time:%H:%M:%S}.{time.microsecond // 1000:03d}"


def parse_timestamp(text: str | bytes) -> datetime | None:
    """Read KNMI's or an ISO 8601 timestamp as naive UTC; None if it is neither."""
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    text = text.strip().strip("\0")
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            return _as_utc(datetime.fromisoformat(text))
        day, month, year, hour, minute, second, fraction = match.groups()
        if month.upper() not in _MONTHS:
            return None
        moment = datetime(int(year), _MONTHS.index(month.upper()) + 1, int(day), int(hour), int(minute))
        # Added as a length: KNMI has written 60 seconds for the end of a minute.
        return moment + timedelta(seconds=int(second), microseconds=int((fraction or "0").ljust(6, "0")))
    except (ValueError, OverflowError):
        return None


def parse_time(text: str, option: str) -> datetime:
    """Read a time that a user gave to ``option``.

    Raises:
        UserError: the text is no time.
    """
    time = parse_timestamp(text)
    if time is None:
        raise UserError(f"{option} {text!r} is not a time; write it like 2019-01-01T00:00 (UTC)")
    return time


def _as_utc(time: datetime) -> datetime:
    offset = time.utcoffset()
    return time if offset is None else (time - offset).replace(tzinfo=None)
