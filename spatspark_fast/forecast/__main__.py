"""Forecast rain from the newest radar frames: ``python -m spatspark_fast.forecast``.

No targets are needed. Reads an NL-50 file or a folder of raw radar files; writes NetCDF, an animation and a panel.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from spatspark_fast.common.cli import command_parser, run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import check_file
from spatspark_fast.common.locks import results_folder
from spatspark_fast.common.options import need

if TYPE_CHECKING:
    from spatspark_fast.forecast.predictors import ModelPredictor
    from spatspark_fast.forecast.result import Forecast
    from spatspark_fast.forecast.starts import Selection

__all__ = ["main"]

# Options that play a part only where --data.path is a file of windows, is a folder of raw files, or is given.
_OF_FILES = ("data.split",)
_OF_FOLDERS = ("source", "crop", "stride", "pattern", "time_format", "importer_options")
_OF_FORECASTS = ("out", "start", "steps", "pictures", "tile", *_OF_FILES, *_OF_FOLDERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(forecast, argv)


def forecast(argv: Sequence[str]) -> None:
    """Read the command line, then forecast or export; raise `UserError` for what is wrong with the input."""
    parser = _parser()
    options = parser.parse_args(list(argv))
    for name in ("steps", "stride", "tile"):
        need(options[name] is None or options[name] >= 1, name, options[name], "give a number of at least 1")
    if options.data.path is None and options.export is None:
        raise UserError("nothing to do: give --data.path and --out to forecast, or --export FILE.onnx")
    if options.data.path is not None and options.out is None:
        raise UserError("--out is missing: name the folder for the forecasts")
    _check_idle(options, parser.get_defaults())
    if options.export is not None:
        check_file("export", Path(options.export), options.overwrite)
    with contextlib.ExitStack() as stack:
        if options.data.path is not None:
            stack.enter_context(results_folder(Path(options.out), options.overwrite))
        _work(options)


def _check_idle(options: Namespace, defaults: Namespace) -> None:
    """Raise `UserError` for an option that is given and would change nothing."""
    path = options.data.path
    if path is None:
        idle, where = _OF_FORECASTS, "without --data.path"
    elif not Path(path).is_dir():
        idle, where = _OF_FOLDERS, "for a file of windows"
    else:
        idle, where = _OF_FILES, "for a folder of raw files"
    for name in idle:
        need(options[name] == defaults[name], name, options[name], f"it means nothing {where}, leave it out")
    every = options.start == "every" or options.stride == defaults.stride
    need(every, "stride", options.stride, "it means nothing without --start every, leave it out")


def _work(options: Namespace) -> None:
    """Load the model, then forecast or export."""
    from spatspark_fast.forecast.predictors import choose_device, load_predictor, split_name
    from spatspark_fast.forecast.tiling import check_tile
    from spatspark_fast.models.forecaster import LONGEST

    name, checkpoint = split_name(options.checkpoint)
    predictor = load_predictor(checkpoint, choose_device(options.device), name, options.tile)
    longest = f"give at most {LONGEST}, two weeks of 5 minutes"
    need(options.steps is None or options.steps <= LONGEST, "steps", options.steps, longest)
    check_tile(options.tile, predictor.loaded.multiple)
    if options.data.path is not None:
        _forecast_all(options, predictor)
    if options.export is not None:
        from spatspark_fast.forecast.onnx import export_onnx

        export_onnx(predictor.loaded, Path(options.export))
        sys.stdout.write(f"wrote {options.export}\n")


def _parser() -> ArgumentParser:
    parser = command_parser(
        "forecast",
        "Forecast rain in mm/h from the newest radar frames, without targets. For each start it writes "
        "forecast_TIME.nc (NetCDF, CF names), and pictures: forecast_TIME.gif and forecast_TIME.png.",
    )
    add = parser.add_argument
    name = "checkpoint of finetune, with a name for files and pictures if you like"
    add("--checkpoint", type=str, required=True, metavar="[NAME=]FILE", help=name)
    add("--data.path", type=str, help="HDF5 file in the NL-50 layout, or folder of raw radar files")
    add("--data.split", type=str, default="test", help="group of the HDF5 file")
    add("--out", type=str, help="folder for the forecasts, new or empty")
    add("--overwrite", action="store_true", help="write into a folder that is not empty, and over an ONNX file")
    add(
        "--start",
        type=str,
        default="newest",
        help="newest: from the newest frames; every: from every window of the file, or every frame of the folder "
        "that --stride picks; or the time (UTC) of the newest frame to use, such as 2010-08-26T06:15",
    )
    add("--steps", type=int, help="frames of 5 minutes to forecast (default: those of training; more go on from those)")
    add("--source", type=str, help="raw files: knmi, mch, fmi or an importer of pysteps (default: by the file names)")
    add(
        "--crop",
        type=str,
        help="raw files: r0:r1,c0:c1 in pixels, or all (default: that of prepare: 288 x 288 pixels)",
    )
    add("--stride", type=int, default=1, help="raw files, with --start every: frames between two starts")
    add("--pattern", type=str, help="raw files: glob of the file names")
    add("--time_format", type=str, help="raw files: strptime pattern of the time in the names, for pysteps' importers")
    add("--importer_options", type=dict | None, default=None, help="raw files: options of pysteps' importer")
    add("--pictures", type=bool | None, default=None, help="draw pictures (default: unless --start every)")
    add("--tile", type=int, help="side in pixels of tiles for images too large for memory (default: no tiles)")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--export",
        type=str,
        metavar="FILE.onnx",
        help="write the model as ONNX, rates in mm/h in and out (extra onnx); with or without --data.path",
    )
    return parser


def _selection(options: Namespace) -> Selection:
    from spatspark_fast.data.radar.timestamps import parse_time
    from spatspark_fast.forecast.starts import Selection

    when = options.start if options.start in ("newest", "every") else parse_time(options.start, "--start")
    return Selection(
        when,
        options.data.split,
        options.source,
        options.crop,
        options.stride,
        options.pattern,
        options.time_format,
        options.importer_options,
    )


def _forecast_all(options: Namespace, predictor: ModelPredictor) -> None:
    """Forecast from one start after the other; only one is in memory."""
    from spatspark_fast.forecast.result import make_forecast
    from spatspark_fast.forecast.starts import read_starts

    out, path = Path(options.out), Path(options.data.path)
    if not path.exists():
        raise UserError(f"--data.path {path} does not exist")
    steps = options.steps or predictor.loaded.out_length
    pictures = options.start != "every" if options.pictures is None else options.pictures
    selection = _selection(options)
    made = 0
    for start in read_starts(path, predictor.in_length, selection):
        result = make_forecast(predictor, start, steps)
        names = _write(out, result, pictures)
        made += 1
        sys.stdout.write(f"{_summary(result)}: wrote {', '.join(names)}\n")
    sys.stdout.write(f"{made} forecast{'s' if made != 1 else ''} in {out}\n")


def _write(out: Path, result: Forecast, pictures: bool) -> list[str]:
    from spatspark_fast.forecast.netcdf import write_netcdf

    stem = out / f"forecast_{re.sub(r'[^A-Za-z0-9]+', '_', result.start.label)}"
    files = [stem.with_suffix(".nc")]
    write_netcdf(result, files[0])
    if pictures:
        from spatspark_fast.common.files import atomic_path
        from spatspark_fast.common.plots import save_figure
        from spatspark_fast.forecast.pictures import forecast_figure, write_animation

        files += [stem.with_suffix(".gif"), stem.with_suffix(".png")]
        write_animation(result, files[1])
        with atomic_path(files[2]) as path:
            save_figure(forecast_figure(result), path)
    return [file.name for file in files]


def _summary(result: Forecast) -> str:
    import numpy as np

    rates, start = result.rates, result.start
    now = f"{start.times[-1]:%Y-%m-%d %H:%M} UTC" if start.times else start.label
    if np.isnan(rates).all():
        return f"{now}, no data in any frame"
    return (
        f"{now}, {result.lead_minutes[-1]:g} minutes, mean {np.nanmean(rates):.2f} mm/h "
        f"(newest frame {np.nanmean(start.rates[-1]) if np.isfinite(start.rates[-1]).any() else np.nan:.2f}), "
        f"at most {np.nanmax(rates):.1f} mm/h"
    )


if __name__ == "__main__":
    sys.exit(main())
