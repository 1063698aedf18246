"""Where a forecast starts: the newest frames before it, from an NL-50 file or from raw radar files.

Frames must follow each other without a gap. What is read is a `Start`: rates, times and the place on the earth.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.radar.archive import Entry, Skipped, find_files, put_in_order, read_frames, scan_times
from spatspark_fast.data.radar.frames import Crop, Frame, Georeference, Source, centre_crop, parse_crop
from spatspark_fast.data.radar.sources import get_source

__all__ = ["Selection", "Start", "guess_source", "read_starts"]


@dataclass(frozen=True)
class Start:
    """Hold the frames before a forecast: ``rates`` ``(T, H, W)`` float32 mm/h, NaN = no data.

    ``times``: ends of the frames, naive UTC, oldest first; None where the file does not tell. ``label`` names the
    start in file names.
    """

    rates: NDArray[np.float32]
    times: list[datetime] | None
    where: Georeference
    label: str
    origin: str
    licence: str = ""
    interval: timedelta = timedelta(minutes=units.FRAME_MINUTES)


@dataclass(frozen=True)
class Selection:
    """Say which starts are wanted: ``when`` is "newest", "every", or the time of the newest frame.

    ``split`` is for NL-50 files; ``source``, ``crop`` (r0:r1,c0:c1, or "all"), ``stride`` (frames between two
    starts) and the options of importers for folders of raw files.
    """

    when: str | datetime = "newest"
    split: str = "test"
    source: str | None = None
    crop: str | None = None
    stride: int = 1
    pattern: str | None = None
    time_format: str | None = None
    importer_options: dict[str, Any] | None = None


def read_starts(path: Path, in_length: int, selection: Selection) -> Iterator[Start]:
    """Read the wanted starts one after another, ``in_length`` frames each.

    Raises:
        UserError: nothing there, a file that cannot be read, too few frames, or a gap between them.
    """
    if path.is_dir():
        yield from _from_folder(path, in_length, selection)
    else:
        yield from _from_file(path, in_length, selection)


def guess_source(folder: Path) -> str:
    """Return the built-in source whose file names end like those in the folder.

    Raises:
        UserError: none, or several.
    """
    names = [path.name.lower() for path in folder.rglob("*") if path.is_file()]
    found = [name for name in ("knmi", "mch", "fmi") if any(n.endswith(get_source(name).suffixes) for n in names)]
    if len(found) != 1:
        which = f"those of {' and '.join(found)}" if found else "none that a built-in source reads"
        raise UserError(f"{folder} holds {which}: say by --source whose radar files to read")
    return found[0]


# From an NL-50 file ------------------------------------------------------------------------------------------------


def _from_file(path: Path, in_length: int, selection: Selection) -> Iterator[Start]:
    windows = NowcastDataset(path, selection.split, input_length=in_length, include_valid=True)
    if selection.when == "every":
        for index in range(len(windows)):
            yield _window_start(windows, index, 0, in_length)
        return
    if selection.when == "newest":
        index = _newest_window(windows)
        total = windows.input_length + windows.output_length
        yield _window_start(windows, index, total - in_length, in_length)
        return
    for index in range(len(windows)):
        ends = windows.times(index)[in_length - 1 :]
        if selection.when in ends:
            yield _window_start(windows, index, [end == selection.when for end in ends].index(True), in_length)
            return
    raise UserError(f"{path}, {selection.split}: no window has {in_length} frames that end at {selection.when} UTC")


def _newest_window(windows: NowcastDataset) -> int:
    """Return the window whose last frame is the newest; the last one where times cannot be read."""
    ends = [next(reversed(windows.times(index)), None) for index in range(len(windows))]
    known = [(end, index) for index, end in enumerate(ends) if end is not None]
    return max(known)[1] if len(known) == len(ends) else len(windows) - 1


def _window_start(windows: NowcastDataset, index: int, first: int, count: int) -> Start:
    item = windows[index]
    frames = np.concatenate((item["input"].numpy(), item["target"].numpy()))[first : first + count]
    rates = units.mm_per_hour(frames, float(windows.scale))
    rates[~item["valid"].numpy()[first : first + count]] = np.nan
    found = windows.times(index)[first : first + count]
    times = [time for time in found if time is not None]
    interval = timedelta(minutes=_number(windows.attributes, "interval_minutes", units.FRAME_MINUTES))
    origin = f"{windows.path.name}, {windows.split} window {index}"
    if len(times) == count:
        _check_gaps(times, interval, origin)
    return Start(
        rates,
        times if len(times) == count else None,
        _stored_place(windows.attributes),
        _label(times[-1]) if len(times) == count else f"window{index:05d}",
        origin,
        str(windows.attributes.get("licence", "")),
        interval,
    )


def _stored_place(attributes: dict[str, Any]) -> Georeference:
    numbers = {name: _number(attributes, name) for name in ("pixel_size_x", "pixel_size_y", "x_left", "y_top")}
    unit = str(attributes.get("projection_unit", "m"))
    return Georeference(str(attributes.get("projection", "")), unit, **numbers)


def _number(attributes: dict[str, Any], name: str, default: float = float("nan")) -> float:
    value = attributes.get(name, default)
    return float(value) if isinstance(value, int | float) else default


# From raw radar files ----------------------------------------------------------------------------------------------


def _from_folder(folder: Path, in_length: int, selection: Selection) -> Iterator[Start]:
    name = selection.source or guess_source(folder)
    source = get_source(name, selection.importer_options, selection.time_format)
    files, _ = find_files(folder, source, selection.pattern)
    found = list(scan_times(source, files, workers=0))
    entries = [entry for entry in found if isinstance(entry, Entry)]
    if not entries:
        first = next(entry for entry in found if isinstance(entry, Skipped))
        raise UserError(
            f"none of the {len(files)} files in {folder} is readable as --source {name}; "
            f"{Path(first.path).name}: {first.reason}"
        )
    interval = timedelta(minutes=units.FRAME_MINUTES)
    entries, _ = put_in_order(entries, interval)
    crop = _choose_crop(selection.crop, source, Path(entries[-1].path))
    if selection.when == "every":
        yield from _every_run(source, entries, crop, in_length, selection.stride)
        return
    if isinstance(selection.when, datetime):
        entries = [entry for entry in entries if entry.time <= selection.when]
        if not entries or entries[-1].time != selection.when:
            raise UserError(f"{folder} has no frame of {selection.when} UTC; see --start")
    if len(entries) < in_length:
        raise UserError(f"{folder} holds {len(entries)} frames in order of time, the model reads {in_length}")
    chosen = entries[-in_length:]
    _check_gaps([entry.time for entry in chosen], interval, str(folder))
    yield _stack(source, [_sound(frame) for frame in read_frames(source, chosen, crop, workers=0)], crop, chosen)


def _choose_crop(asked: str | None, source: Source, path: Path) -> Crop | None:
    """Return the crop asked for, else the one that `prepare` takes; None for the whole image."""
    if asked == "all":
        return None
    crop = parse_crop(asked) if asked else source.crop
    if crop is None:
        crop = centre_crop(source.read(path, None).image_shape)
    return crop


def _every_run(
    source: Source, entries: Sequence[Entry], crop: Crop | None, in_length: int, stride: int
) -> Iterator[Start]:
    """Yield a start at every ``stride``-th frame that ends a run without gaps; unreadable files are gaps."""
    run: deque[tuple[Frame, Entry]] = deque(maxlen=in_length)
    length = made = 0
    step = 1.1 * timedelta(minutes=units.FRAME_MINUTES)
    for entry, frame in zip(entries, read_frames(source, entries, crop, workers=0), strict=True):
        if isinstance(frame, Skipped) or (run and (entry.time - run[-1][1].time > step or _other_size(frame, run))):
            run.clear()
            length = 0
        if isinstance(frame, Skipped):
            continue
        run.append((frame, entry))
        length += 1
        if length >= in_length and (length - in_length) % stride == 0:
            made += 1
            yield _stack(source, [one for one, _ in run], crop, [one for _, one in run])
    if not made:
        raise UserError(
            f"no {in_length} of the {len(entries)} frames follow each other in steps of {units.FRAME_MINUTES:g} minutes"
        )


def _other_size(frame: Frame, run: deque[tuple[Frame, Entry]]) -> bool:
    return frame.image_shape != run[-1][0].image_shape


def _sound(frame: Frame | Skipped) -> Frame:
    if isinstance(frame, Skipped):
        raise UserError(f"{frame.path} cannot be read: {frame.reason}; start before it by --start TIME")
    return frame


def _stack(source: Source, frames: Sequence[Frame], crop: Crop | None, entries: Sequence[Entry]) -> Start:
    if len({frame.image_shape for frame in frames}) > 1:
        shapes = sorted({frame.image_shape for frame in frames})
        raise UserError(f"the frames up to {entries[-1].path} are images of different sizes: {shapes}")
    depth = np.stack([np.where(frame.valid, frame.rain, np.float32(np.nan)) for frame in frames])
    place = source.georeference(Path(entries[-1].path))
    return Start(
        units.mm_per_5min_to_mm_per_hour(depth).astype(np.float32),
        [entry.time for entry in entries],
        place if crop is None else place.cropped(crop),
        _label(entries[-1].time),
        f"{source.name} radar",
        source.licence,
    )


def _check_gaps(times: Sequence[datetime], interval: timedelta, origin: str) -> None:
    for before, after in itertools.pairwise(times):
        step = after - before
        if not 0.9 * interval <= step <= 1.1 * interval:
            raise UserError(
                f"{origin}: between {before} and {after} UTC lie {step.total_seconds() / 60:g} minutes, not "
                f"{interval.total_seconds() / 60:g}; a forecast needs {len(times)} frames without a gap (see --start)"
            )


def _label(time: datetime) -> str:
    return f"{time:%Y%m%dT%H%MZ}"
