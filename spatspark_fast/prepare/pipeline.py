"""Turn an archive of radar files into one NL-50 file, as a stream."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from spatspark_fast import __version__
from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import check_file
from spatspark_fast.common.progress import Track, silently
from spatspark_fast.data.radar.archive import Entry, Skipped, choose_split, find_files, put_in_order, read_frames
from spatspark_fast.data.radar.archive import scan_times as scan
from spatspark_fast.data.radar.frames import Crop, Frame, FrameError, Georeference, Source, centre_crop
from spatspark_fast.prepare.cutter import Cut, WindowCutter, WindowRules
from spatspark_fast.prepare.writer import NL50Writer

__all__ = ["Plan", "Report", "prepare_archive"]

_FILES_PER_WORKER = 200  # a spawned process takes as long to start as about this many files to read


@dataclass(frozen=True)
class Plan:
    """Say what to read, how to cut it and where to write it; ``spatspark_fast.prepare`` explains each."""

    source: Source
    folder: Path
    out: Path
    rules: WindowRules = field(default_factory=WindowRules)
    crop: Crop | None = None
    scale: float = units.NL50_SCALE
    test_fraction: float = 0.2
    test_from: datetime | None = None
    pattern: str | None = None
    workers: int | None = None
    overwrite: bool = False


@dataclass
class Report:
    """Say what came of an archive."""

    out: Path
    files: int = 0
    other_files: int = 0
    first: datetime | None = None
    last: datetime | None = None
    test_from: datetime | None = None
    crop: Crop | None = None
    frames: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    cut: Cut = field(default_factory=Cut)


def prepare_archive(plan: Plan, track: Track = silently) -> Report:
    """Write ``plan.out`` and report what was used and what was not.

    Every image is read once. What is held at a time: one window of frames, a few frames and compressed
    windows on their way, and about a quarter of a kilobyte for each file (its name and time).
    ``track`` may show progress.

    Raises:
        UserError: nothing to read, nothing readable, no window kept, or ``out`` exists already.
    """
    _check(plan)
    files, other_files = find_files(plan.folder, plan.source, plan.pattern)
    report = Report(plan.out, files=len(files), other_files=other_files)
    workers = _workers(plan.workers, len(files))
    entries = _scan(plan, files, workers, track, report)
    reference, image_shape = _first_image(plan.source, entries, report)
    crop = plan.crop or plan.source.crop or centre_crop(image_shape)
    crop.check(image_shape)
    report.crop = crop
    report.test_from = plan.test_from or choose_split(
        [entry.time for entry in entries], plan.rules.interval, plan.rules.needed, plan.test_fraction
    )
    shape = (plan.rules.window, *crop.shape)
    with NL50Writer(plan.out, shape, plan.scale, threads=max(1, workers)) as writer:
        cutter = WindowCutter(plan.rules, report.test_from, writer.add)
        report.cut = cutter.cut
        frames = read_frames(plan.source, entries, crop, workers)
        for entry, frame in zip(entries, track(frames, "reading", len(entries)), strict=True):
            if isinstance(frame, Skipped):
                report.skipped.append(frame)
            elif frame.image_shape != image_shape:
                report.skipped.append(Skipped(entry.path, _other_shape(frame, image_shape)))
            else:
                report.frames += 1
                cutter.push(frame)
        _check_result(plan, report)
        writer.set_attributes(_attributes(plan, report, reference.cropped(crop)))
    return report


def _check(plan: Plan) -> None:
    if not 0 <= plan.test_fraction <= 1:
        raise UserError(f"--test_fraction is a share from 0 to 1, got {plan.test_fraction}")
    if not plan.scale > 0:
        raise UserError(f"--scale must be positive (mm per 5 min), got {plan.scale}")
    if plan.workers is not None and plan.workers < 0:
        raise UserError(f"--data.num_workers must be 0 or more, got {plan.workers}")
    check_file("out", plan.out, plan.overwrite)


def _workers(asked: int | None, files: int) -> int:
    if asked is not None:
        return asked
    return min(os.cpu_count() or 1, files // _FILES_PER_WORKER)


def _scan(plan: Plan, files: list[str], workers: int, track: Track, report: Report) -> list[Entry]:
    entries: list[Entry] = []
    for found in track(scan(plan.source, files, workers), "times", len(files)):
        if isinstance(found, Skipped):
            report.skipped.append(found)
        else:
            entries.append(found)
    if not entries:
        first = report.skipped[0]
        raise UserError(
            f"none of the {len(files)} files in {plan.folder} is readable as --source {plan.source.name}; "
            f"{Path(first.path).name}: {first.reason}"
        )
    entries, doubles = put_in_order(entries, plan.rules.interval)
    report.skipped += doubles
    report.first, report.last = entries[0].time, entries[-1].time
    return entries


def _first_image(source: Source, entries: list[Entry], report: Report) -> tuple[Georeference, tuple[int, int]]:
    """Return where the images lie and their shape, by the first one that can be read."""
    reason = ""
    for entry in entries:
        try:
            shape = source.read(Path(entry.path), None).image_shape
            return source.georeference(Path(entry.path)), shape
        except FrameError as error:
            reason = reason or f"{Path(entry.path).name}: {error}"
    raise UserError(f"none of the {report.files} files holds a readable image; {reason}")


def _other_shape(frame: Frame, shape: tuple[int, int]) -> str:
    return f"image of shape {frame.image_shape}, where the first has {shape}"


def _check_result(plan: Plan, report: Report) -> None:
    cut = report.cut
    if sum(cut.kept.values()) > 0:
        return
    dry = sum(cut.dry.values())
    if dry:
        raise UserError(
            f"no window is kept: {dry} windows are less than {plan.rules.wet_fraction:.0%} wet; lower --wet_fraction"
        )
    if report.frames and len(cut.empty_frames) == report.frames:
        raise UserError(
            f"no window is kept: crop {report.crop} has data in less than {plan.rules.min_valid:.0%} of its "
            f"pixels in every frame; choose another --crop or lower --min_valid"
        )
    raise UserError(
        f"no window is kept: no {plan.rules.needed} of the {report.frames} readable frames follow each other "
        f"in steps of {plan.rules.interval.total_seconds() / 60:g} minutes on one side of the split "
        f"({cut.gaps} gaps); see --data.input_length, --data.output_length and --interval_minutes"
    )


def _attributes(plan: Plan, report: Report, where: Georeference) -> dict[str, str | float | int]:
    rules = plan.rules
    return {
        "title": "Radar rain windows in the layout of NL-50",
        "software": f"spatspark-fast {__version__}",
        "source": plan.source.name,
        "source_options": ", ".join(f"{key}={value}" for key, value in sorted(plan.source.options.items())),
        "licence": plan.source.licence,
        "units": "mm per 5 min, divided by scale_mm_per_5min",
        "scale_mm_per_5min": plan.scale,
        "interval_minutes": rules.interval.total_seconds() / 60,
        "input_length": rules.input_length,
        "output_length": rules.output_length,
        "stride": rules.stride,
        "wet_fraction": rules.wet_fraction,
        "wet_rule": rules.wet_rule,
        "wet_threshold_mm_per_hour": rules.wet_threshold,
        "min_valid": rules.min_valid,
        "test_from": report.test_from.isoformat() if report.test_from else "",
        "crop": str(report.crop),
        "projection": where.projection,
        "projection_unit": where.unit,
        "pixel_size_x": where.pixel_size_x,
        "pixel_size_y": where.pixel_size_y,
        "x_left": where.x_left,
        "y_top": where.y_top,
    }
