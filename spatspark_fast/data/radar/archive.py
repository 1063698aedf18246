"""Find the files of an archive, put them in order of time, and read them as a stream of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.parallel import ordered_map
from spatspark_fast.data.radar.frames import Crop, Frame, FrameError, Source

__all__ = ["Entry", "Skipped", "choose_split", "find_files", "put_in_order", "read_frames", "scan_times"]


class Entry(NamedTuple):
    """Name a file and its time (naive UTC)."""

    time: datetime
    path: str


@dataclass(frozen=True)
class Skipped:
    """Name a file that is not used, and why."""

    path: str
    reason: str


def find_files(folder: Path, source: Source, pattern: str | None = None) -> tuple[list[str], int]:
    """List the files of the source under a folder, sorted, and count the other files.

    ``pattern`` is a glob for the file's name, instead of the source's suffixes.

    Raises:
        UserError: no folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UserError(f"--data.path {folder} is not a folder")
    chosen: list[str] = []
    others = 0
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        wanted = path.match(pattern) if pattern else path.name.lower().endswith(source.suffixes)
        if wanted:
            chosen.append(str(path))
        else:
            others += 1
    if not chosen:
        kind = f"matching {pattern!r}" if pattern else f"ending in {' or '.join(source.suffixes)}"
        raise UserError(f"--data.path {folder} has no file {kind}, which --source {source.name} would read")
    return sorted(chosen), others


def scan_times(source: Source, paths: Sequence[str], workers: int) -> Iterator[Entry | Skipped]:
    """Read the time of every file, in their order."""
    return ordered_map(partial(_scan, source), paths, workers, batch=64)


def read_frames(source: Source, entries: Sequence[Entry], crop: Crop | None, workers: int) -> Iterator[Frame | Skipped]:
    """Read every file once, in their order, holding only a few frames at a time."""
    return ordered_map(partial(_read, source, crop), (entry.path for entry in entries), workers, batch=8)


def put_in_order(entries: list[Entry], interval: timedelta) -> tuple[list[Entry], list[Skipped]]:
    """Sort by time, and keep frames one interval apart: the first by name of those at the same time."""
    kept: list[Entry] = []
    skipped: list[Skipped] = []
    for entry in sorted(entries):
        if kept and entry.time == kept[-1].time:
            skipped.append(Skipped(entry.path, f"same time as {Path(kept[-1].path).name}"))
        elif kept and entry.time - kept[-1].time < 0.9 * interval:
            skipped.append(Skipped(entry.path, "within --interval_minutes of the frame before"))
        else:
            kept.append(entry)
    return kept, skipped


def choose_split(times: Sequence[datetime], interval: timedelta, window: int, fraction: float) -> datetime | None:
    """Choose the time from which frames belong to the test split; None = nothing does.

    Of the windows of ``window`` frames that lie wholly on one side of that time, the share on the later side
    is as close as possible to ``fraction``; whether they are wet is not known yet, and plays no part.
    """
    if fraction <= 0 or not times:
        return None
    if fraction >= 1:
        return times[0]
    seconds = np.array([(time - times[0]).total_seconds() for time in times])
    index = np.arange(len(times))
    starts_run = np.concatenate([[True], np.diff(seconds) > 1.1 * interval.total_seconds()])
    run_start = np.maximum.accumulate(np.where(starts_run, index, 0))
    complete = np.concatenate([[0], np.cumsum(index - run_start + 1 >= window)])  # windows that end before i
    train = complete[index]
    test = complete[-1] - complete[np.minimum(index + window - 1, len(times))]
    # Among equally good times the one that wastes the fewest windows.
    error = np.abs(test - fraction * (train + test)) - 1e-6 * (train + test)
    usable = (train > 0) & (test > 0)
    if not usable.any():
        return None
    return times[int(np.argmin(np.where(usable, error, np.inf)))]


def _scan(source: Source, paths: list[str]) -> list[Entry | Skipped]:
    found: list[Entry | Skipped] = []
    for path in paths:
        try:
            found.append(Entry(source.read_time(Path(path)), path))
        except FrameError as error:
            found.append(Skipped(path, str(error)))
    return found


def _read(source: Source, crop: Crop | None, paths: list[str]) -> list[Frame | Skipped]:
    frames: list[Frame | Skipped] = []
    for path in paths:
        try:
            frames.append(source.read(Path(path), crop))
        except FrameError as error:
            frames.append(Skipped(path, str(error)))
    return frames
