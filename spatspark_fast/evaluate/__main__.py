"""Score forecasts against what was observed: ``python -m spatspark_fast.evaluate``.

Several models and baselines side by side, on the same pixels of the same windows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ArgumentParser, Namespace

from spatspark_fast import __version__
from spatspark_fast.common.cli import command_parser, run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.locks import results_folder
from spatspark_fast.common.options import need
from spatspark_fast.common.progress import track
from spatspark_fast.forecast.baselines import BASELINES_HELP, Baseline, load_baselines
from spatspark_fast.scores.defaults import FSS_SCALES, THRESHOLDS

if TYPE_CHECKING:
    from spatspark_fast.data.nl50 import NowcastDataset
    from spatspark_fast.evaluate.scoring import Evaluation, ScoringOptions
    from spatspark_fast.forecast.predictors import Predictor

__all__ = ["main"]

REGIONS = {
    "observed": "every pixel with data counts, and a method that says nothing of it says dry",
    "common": "a pixel counts where it has data and every method says something of it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(evaluate, argv)


def evaluate(argv: Sequence[str]) -> None:
    """Read the command line, score, and write the reports; raise `UserError` for what is wrong with the input."""
    options = _parser().parse_args(list(argv))
    checkpoints = [word for words in options.checkpoint or [] for word in words]
    if not checkpoints and not options.baselines:
        raise UserError("nothing to score: give a --checkpoint of finetune, or --baselines persistence")
    out = Path(options.out)
    with results_folder(out, options.overwrite):
        settings, predictors, windows = _load(options, checkpoints)
        from spatspark_fast.evaluate.scoring import evaluate_predictors, spread

        keep = spread(len(windows), options.panels) if options.panels else []
        if settings.max_windows:
            chosen = spread(len(windows), settings.max_windows)
            keep = [chosen[i] for i in spread(len(chosen), options.panels)] if options.panels else []
        evaluation = evaluate_predictors(predictors, windows, settings, keep, track)
        _write(out, options, settings, checkpoints, windows, evaluation)


def _parser() -> ArgumentParser:
    parser = command_parser(
        "evaluate",
        "Score the forecasts of models and baselines on the windows of a file, side by side: errors, "
        "scores at thresholds in mm/h, fractions skill, power spectra; for every lead time and over all. Writes "
        "scores.json, scores.csv, scores.md and pictures.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        action="append",
        nargs="+",
        metavar="[NAME=]FILE",
        help="checkpoint of finetune, with a name for tables and pictures if you like; may be given several times",
    )
    add("--data.path", required=True, help="HDF5 file in the NL-50 layout, as prepare writes it")
    add("--data.split", default="test", help="group of the file to score on")
    add("--out", required=True, help="folder for the results, new or empty")
    add("--overwrite", action="store_true", help="write into a folder that is not empty")
    add("--baselines", type=Baseline, nargs="*", default=["persistence"], help=BASELINES_HELP)
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="rain rates in mm/h; wet is above")
    add(
        "--fss_scales",
        type=int,
        nargs="*",
        default=list(FSS_SCALES),
        help="sides in pixels of the neighbourhoods of the fractions skill score; none leaves it out",
    )
    add("--spectrum", type=bool, default=True, help="compute power spectra")
    add(
        "--region",
        choices=list(REGIONS),
        default="observed",
        help="; ".join(f"{name}: {words}" for name, words in REGIONS.items()),
    )
    add("--steps", type=int, help="frames of 5 minutes to forecast (default: all that models and file have)")
    add("--max_windows", type=int, help="score only so many windows, spread evenly over the file (default: all)")
    add("--data.batch_size", type=int, default=4, help="windows forecast at once; memory grows with it")
    add("--panels", type=int, default=3, help="windows of which maps are drawn, spread evenly over the file")
    add("--tile", type=int, help="side in pixels of tiles for images too large for memory (default: no tiles)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def _load(options: Namespace, checkpoints: Sequence[str]) -> tuple[ScoringOptions, list[Predictor], NowcastDataset]:
    """Open everything that can be wrong before the work starts."""
    from spatspark_fast.evaluate.scoring import ScoringOptions
    from spatspark_fast.forecast.predictors import choose_device, load_predictor, split_name
    from spatspark_fast.forecast.tiling import check_tile

    for name in ("data.batch_size", "max_windows", "steps"):
        need(options[name] is None or options[name] >= 1, name, options[name], "give a number of at least 1")
    need(options.panels >= 0, "panels", options.panels, "give a number of at least 0")
    device = choose_device(options.device)
    named = [split_name(word) for word in checkpoints]
    models = [load_predictor(path, device, name, options.tile) for name, path in named]
    for model in models:
        check_tile(options.tile, model.loaded.multiple)
    predictors: list[Predictor] = [*models]
    _name_apart(predictors, [path for _, path in named])
    predictors += load_baselines(options.baselines)
    needed = max(predictor.in_length for predictor in predictors)
    windows = _open_windows(options.data.path, options.data.split, needed)
    settings = ScoringOptions(
        options.thresholds,
        options.fss_scales,
        options.spectrum,
        options.region,
        options.steps,
        options.data.batch_size,
        options.max_windows,
        device,
    )
    from spatspark_fast.scores.nowcast import NowcastScores

    try:
        NowcastScores(1, windows.image_size, settings.thresholds, settings.fss_scales, False)
    except ValueError as error:
        raise UserError(f"--thresholds or --fss_scales: {error}") from error
    return settings, predictors, windows


def _open_windows(path: str, split: str, needed: int) -> NowcastDataset:
    """Open the file such that the present is where it says, or after as many frames as the models need."""
    from spatspark_fast.data.nl50 import NowcastDataset

    windows = NowcastDataset(path, split, input_length=needed, include_valid=True)
    stated = windows.attributes.get("input_length")
    if isinstance(stated, int) and stated > needed:
        # Baselines need fewer frames than a model, and must forecast from the same present.
        windows = NowcastDataset(path, split, input_length=stated, include_valid=True)
    return windows


def _name_apart(predictors: Sequence[Any], paths: Sequence[Path]) -> None:
    """Add the file's run directory to names that several models share, and a number where even that is the same."""
    names = [predictor.name for predictor in predictors]
    for predictor, path in zip(predictors, paths, strict=True):
        if names.count(predictor.name) > 1:
            folder = path.absolute().parent
            run = folder.parent.name if folder.name == "checkpoints" else folder.name
            predictor.name = f"{predictor.name} [{run}]"
    taken: set[str] = set(get_args(Baseline))
    for predictor in predictors:
        name, number = predictor.name, 1
        while predictor.name in taken:
            number += 1
            predictor.name = f"{name} ({number})"
        taken.add(predictor.name)


def _write(
    out: Path,
    options: Namespace,
    settings: ScoringOptions,
    checkpoints: Sequence[str],
    windows: NowcastDataset,
    evaluation: Evaluation,
) -> None:
    from spatspark_fast.common.files import atomic_path, package_versions
    from spatspark_fast.common.plots import save_figure
    from spatspark_fast.evaluate.pictures import lead_time_figure, panel_figure, spectra_figure
    from spatspark_fast.evaluate.report import overall_table, write_reports

    about = {
        "software": f"spatspark-fast {__version__}",
        "versions": package_versions(),
        "data": Path(options.data.path).name,
        "split": options.data.split,
        "checkpoints": list(checkpoints),
        "region": settings.region,
        "region_words": REGIONS[settings.region],
        "scale_mm_per_5min": windows.scale,
    }
    scores = evaluation.scores
    write_reports(out, about, scores)
    interval = next(iter(scores.values()))["lead_minutes"][0]
    figures = {"lead_times": lead_time_figure(scores), "spectra": spectra_figure(scores)}
    for kept in evaluation.kept:
        now = next(iter(windows.times(kept.index)[windows.input_length - 1 :]), None)
        title = f"window {kept.index}" + (f", now {now:%Y-%m-%d %H:%M} UTC" if now else "")
        figures[f"panel_{kept.index:05d}"] = panel_figure(kept, interval, title)
    for name, figure in figures.items():
        if figure is not None:
            with atomic_path(out / f"{name}.png") as path:
                save_figure(figure, path)
    first = next(iter(scores.values()))
    sys.stdout.write(
        f"{first['windows']} windows, {first['lead_minutes'][-1]:g} minutes; CSI at thresholds in mm/h\n\n"
    )
    sys.stdout.write("\n".join(overall_table(scores)) + f"\n{_undefined(scores)}\nwrote {out}\n")


def _undefined(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Say at which thresholds there is nothing to score; nothing if there are none."""
    rates = next(iter(scores.values()))["thresholds_mm_per_hour"]
    dry = [f"{rate:g}" for rate in rates if all(math.isnan(found["all"][f"csi@{rate:g}"]) for found in scores.values())]
    if not dry:
        return ""
    return f"Neither observed nor forecast rain is above {', '.join(dry)} mm/h: scores are undefined there (-)\n"


if __name__ == "__main__":
    sys.exit(main())
