"""Turn radar files into one file of training windows, or merge such files: ``python -m spatspark_fast.prepare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from spatspark_fast.common import units
from spatspark_fast.common.cli import command_parser, run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import check_file
from spatspark_fast.common.progress import track
from spatspark_fast.data.radar.frames import parse_crop
from spatspark_fast.data.radar.sources import get_source
from spatspark_fast.data.radar.timestamps import parse_time
from spatspark_fast.prepare.cutter import WetRule, WindowRules
from spatspark_fast.prepare.pipeline import Plan, Report, prepare_archive

__all__ = ["main", "parse", "plan_of", "summary"]

_LISTED = 10  # skipped files that the summary names; it counts the others
# Options that only --merge knows, and those that both ways know; all others are for radar files.
_OF_MERGING = ("merge", "test_file", "data.synthetic_windows")
_OF_BOTH = ("out", "overwrite")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(prepare, argv)


def prepare(argv: Sequence[str]) -> None:
    """Read the command line, then prepare or merge; raise `UserError` for what is wrong with the input."""
    options = parse(argv)
    if options.merge is not None:
        _merge(options)
        return
    sys.stdout.write(summary(prepare_archive(plan_of(options), track)) + "\n")


def parse(argv: Sequence[str]) -> Namespace:
    """Read the command line; raise `UserError` for options that do not go together."""
    parser = _parser()
    options = parser.parse_args(list(argv))
    merging = options.merge is not None
    for name, default in parser.get_defaults().items():
        if name not in _OF_BOTH and (name in _OF_MERGING) != merging and options[name] != default:
            raise UserError(f"--{name} means nothing {'with' if merging else 'without'} --merge: leave it out")
    for name in ("out",) if merging else ("source", "data.path", "out"):
        if options[name] is None:
            raise UserError(f"--{name} is missing: give --source, --data.path and --out, or --merge FILES and --out")
    return options


def _parser() -> ArgumentParser:
    parser = command_parser(
        "prepare",
        "Turn raw radar files into one HDF5 file of training windows in the layout of NL-50, or merge such "
        "files into one.",
    )
    parser.add_argument("--out", type=str, help="HDF5 file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    _add_reading(parser)
    _add_windows(parser)
    add = parser.add_argument_group("merge files of windows").add_argument
    add(
        "--merge",
        nargs="+",
        metavar="FILE",
        help="files of this command, with one --scale, whose training windows are put into one; the first gives the "
        "test windows",
    )
    add("--test_file", metavar="FILE", help="file that gives the test windows instead: its own, or all if it has none")
    add("--data.synthetic_windows", type=int, default=0, help="windows of the synthetic radar to add for training")
    return parser


def _add_reading(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("read radar files").add_argument
    add("--source", type=str, help="knmi, mch, fmi or an importer of pysteps, such as odim_hdf5 or mrms_grib")
    add("--data.path", type=str, help="folder of raw radar files, searched with its subfolders")
    add("--pattern", type=str, help="glob of the file names (default: by the source's usual endings)")
    add("--time_format", type=str, help="strptime pattern of the time in the names, for pysteps' importers")
    add("--importer_options", type=dict | None, help='options of pysteps\' importer, such as \'{"qty": "DBZH"}\'')
    add(
        "--crop",
        type=str,
        help="r0:r1,c0:c1, rows and columns to keep (default: knmi 282:570,225:513; others the 288 x 288 pixels at the "
        "centre)",
    )
    add(
        "--data.num_workers",
        type=int,
        help="processes that read; 0 reads in this one (default: one per 200 files, at most one per CPU core)",
    )


def _add_windows(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("cut windows").add_argument
    usual = WindowRules
    add("--data.input_length", type=int, default=usual.input_length, help="frames of a window up to the present")
    add("--data.output_length", type=int, default=usual.output_length, help="frames of a window after the present")
    add("--stride", type=int, default=usual.stride, help="frames between the starts of two windows")
    add(
        "--interval_minutes",
        type=float,
        default=units.FRAME_MINUTES,
        help="time between frames in minutes; a longer step is a gap, which ends a window",
    )
    share = "a window is kept if this share of its target pixels is wet"
    add("--wet_fraction", type=float, default=usual.wet_fraction, help=share)
    add(
        "--wet_rule",
        choices=get_args(WetRule),
        default=usual.wet_rule,
        help="wet share of what: all target frames on average, the last target frame, or the frame after the window "
        "(as in the published NL-50 files)",
    )
    add("--wet_threshold", type=float, default=usual.wet_threshold, help="rain rate in mm/h above which a pixel is wet")
    share = "a frame with a smaller share of valid pixels in the crop counts as missing"
    add("--min_valid", type=float, default=usual.min_valid, help=share)
    add("--scale", type=float, default=Plan.scale, help="depth in mm per 5 min by which values are divided")
    share = "share of the windows that goes to the test split, the latest in time"
    add("--test_fraction", type=float, default=Plan.test_fraction, help=share)
    add("--test_from", type=str, help="time (UTC), such as 2019-01-01T00:00, at which the test split starts instead")


def plan_of(options: Namespace) -> Plan:
    """Turn options into a plan; raise `UserError` naming the one that means nothing."""
    minutes = float(options.interval_minutes)
    if not 0 < minutes < 60 * 24 * 366:
        raise UserError(f"--interval_minutes must be positive, got {options.interval_minutes}")
    rules = WindowRules(
        options.data.input_length,
        options.data.output_length,
        options.stride,
        options.wet_fraction,
        options.wet_rule,
        options.wet_threshold,
        options.min_valid,
        timedelta(minutes=minutes),
    )
    return Plan(
        source=get_source(options.source, options.importer_options, options.time_format),
        folder=Path(options.data.path),
        out=Path(options.out),
        rules=rules,
        crop=parse_crop(options.crop) if options.crop else None,
        scale=options.scale,
        test_fraction=options.test_fraction,
        test_from=parse_time(options.test_from, "--test_from") if options.test_from else None,
        pattern=options.pattern,
        workers=options.data.num_workers,
        overwrite=options.overwrite,
    )


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


def _merge(options: Namespace) -> None:
    from spatspark_fast.prepare.merging import merge_files  # loads torch for synthetic radar

    out = Path(options.out)
    check_file("out", out, options.overwrite)
    test = None if options.test_file is None else Path(options.test_file)
    counts = merge_files([Path(file) for file in options.merge], out, test, options.data.synthetic_windows)
    sys.stdout.write(f"{out}: {counts['train']} training windows, {counts['test']} test windows\n")


if __name__ == "__main__":
    sys.exit(main())
