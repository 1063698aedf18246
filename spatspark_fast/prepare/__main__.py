"""Turn raw radar files into one HDF5 file of training windows: ``python -m spatspark_fast.prepare``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.progress import track
from spatspark_fast.data.radar.frames import parse_crop
from spatspark_fast.data.radar.sources import get_source
from spatspark_fast.data.radar.timestamps import parse_time
from spatspark_fast.prepare.cutter import WetRule, WindowRules
from spatspark_fast.prepare.pipeline import Plan, Report, prepare_archive

__all__ = ["PrepareOptions", "main", "prepare", "summary"]

_LISTED = 10  # skipped files that the summary names; it counts the others


@dataclass
class PrepareOptions:
    """Say what to read, what to keep and where to write; the options of the command.

    Args:
        source: knmi, mch or fmi, or the name of one of pysteps' importers, such as odim_hdf5 or mrms_grib.
        input: folder of radar files, searched with its subfolders.
        out: HDF5 file to write.
        input_length: frames of a window before the present.
        output_length: frames of a window after the present.
        stride: frames between the starts of two windows.
        wet_fraction: a window is kept if this share of its target pixels is wet.
        wet_rule: wet share of what: all target frames on average, the last target frame, or the frame after
            the window (as in the published NL-50 files).
        wet_threshold: rain rate in mm/h above which a pixel is wet.
        interval_minutes: time between frames in minutes; a longer step is a gap, which ends a window.
        crop: r0:r1,c0:c1, rows and columns to keep (default: knmi 282:570,225:513; others the 288 x 288
            pixels at the centre).
        min_valid: a frame with a smaller share of valid pixels in the crop counts as missing.
        scale: depth in mm per 5 min by which values are divided.
        test_fraction: share of the windows that goes to the test split, the latest in time.
        test_from: time (UTC) such as 2019-01-01T00:00 at which the test split starts, instead of a share.
        pattern: glob of the file names to read, instead of the source's usual endings.
        time_format: strptime pattern of the time in the file names, for pysteps' importers.
        importer_options: options of pysteps' importer, such as '{"qty": "DBZH"}'.
        workers: processes that read; 0 reads in this one (default: one per 200 files, at most one per
            CPU core).
        overwrite: replace the file if it exists.
    """

    source: str
    input: str
    out: str
    input_length: int = 12
    output_length: int = 12
    stride: int = 1
    wet_fraction: float = 0.5
    wet_rule: WetRule = "target-mean"
    wet_threshold: float = units.MIN_WET_RATE
    interval_minutes: float = units.FRAME_MINUTES
    crop: str | None = None
    min_valid: float = 0.5
    scale: float = units.NL50_SCALE
    test_fraction: float = 0.2
    test_from: str | None = None
    pattern: str | None = None
    time_format: str | None = None
    importer_options: dict[str, Any] | None = None
    workers: int | None = None
    overwrite: bool = False


def prepare(options: PrepareOptions) -> Report:
    """Turn raw radar files into one HDF5 file of training windows, in the layout of NL-50."""
    minutes = float(options.interval_minutes)
    if not 0 < minutes < 60 * 24 * 366:
        raise UserError(f"--interval-minutes must be positive, got {options.interval_minutes}")
    rules = WindowRules(
        options.input_length,
        options.output_length,
        options.stride,
        options.wet_fraction,
        options.wet_rule,
        options.wet_threshold,
        options.min_valid,
        timedelta(minutes=minutes),
    )
    plan = Plan(
        source=get_source(options.source, options.importer_options, options.time_format),
        folder=Path(options.input),
        out=Path(options.out),
        rules=rules,
        crop=parse_crop(options.crop) if options.crop else None,
        scale=options.scale,
        test_fraction=options.test_fraction,
        test_from=parse_time(options.test_from, "--test-from") if options.test_from else None,
        pattern=options.pattern,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    return prepare_archive(plan, track)


def summary(report: Report) -> str:
    """Write a report in words: what was read, what was kept, what was skipped and why."""
    cut = report.cut
    largest = units.mm_per_5min_to_mm_per_hour(cut.largest_depth)
    lines = [
        f"files   {report.files} from {report.first:%Y-%m-%d %H:%M} to {report.last:%Y-%m-%d %H:%M} UTC"
        f" ({report.other_files} others ignored)",
        f"frames  {report.frames} read, {cut.gaps} gaps in time ({cut.missing_frames} frames missing, "
        f"longest step {cut.longest_gap}), {len(cut.empty_frames)} without enough data",
    ]
    for split in ("train", "test"):
        lines.append(f"{split:7} {cut.kept[split]} windows kept, {cut.dry[split]} dry ones left out")
    if report.test_from:
        lines.append(f"split   test starts at {report.test_from:%Y-%m-%d %H:%M} UTC")
    else:
        lines.append("split   everything is train: no test asked for, or no time leaves windows on both sides")
    lines.append(f"rain    at most {largest:.1f} mm/h in crop {report.crop}")
    if report.skipped:
        lines.append(f"skipped {len(report.skipped)} files")
        lines += [f"        {Path(item.path).name}: {item.reason}" for item in report.skipped[:_LISTED]]
        if len(report.skipped) > _LISTED:
            lines.append(f"        and {len(report.skipped) - _LISTED} more")
    lines.append(f"wrote   {report.out} ({report.out.stat().st_size / 2**20:.1f} MiB)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # Here and not above: the processes that read files import this module, and need none of that.
    from spatspark_fast.common.cli import run_command

    return run_command(_run, argv)


class _Parser(ArgumentParser):
    """Spell options with dashes, as the help of most commands does; underscores work too."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(
            r"--[a-z][a-z_]+",
            lambda option: option.group(0).replace("_", "-"),
            super().format_help(*args, **kwargs),
        )


def _run(argv: list[str]) -> None:
    from spatspark_fast.common.cli import program

    parser = _Parser(prog=program("prepare"), exit_on_error=False)
    parser.add_class_arguments(PrepareOptions, as_positional=False, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(argv)
    sys.stdout.write(summary(prepare(PrepareOptions(**vars(options)))) + "\n")


if __name__ == "__main__":
    sys.exit(main())
