"""All that a GPU can check and measure: ``python -m benchmarks gpu``, in calls of ten minutes.

``--plan all`` runs everything until ``--minutes`` are up and prints the command for what is left. ``--plan short`` runs
one of three parts, whose lines have limits of their own (``plan.py``). Rows of several calls fill the same tables. A
kernel that a check finds wrong has no figures; all others are measured. However a call ends, there is one archive of
all that it left, and the last lines it prints are a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..measure.device import has_gpu
from ..measure.machine import folder_name, provenance
from .goals import goal_table
from .plan import EVERYTHING, PARTS, SHORT, TUNE, WHEELS, Line
from .runner import ROOT, Ended, Runner, StoppedError, pack, signals_raise

__all__ = ["add_options", "gpu"]

OUT = ROOT / "build" / "gpu"


def add_options(found: argparse.ArgumentParser, scales: Sequence[str]) -> None:
    """Add the options of the command."""
    found.add_argument("--plan", choices=("all", "short"), default="all", help="what to run (default: all)")
    found.add_argument("--part", type=int, choices=sorted(PARTS), help="of the short plan; default all")
    found.add_argument("--tune", action="store_true", help="measure configurations, and write the package's table")
    found.add_argument("--stages", nargs="+", metavar="NAME", help="some lines of the plan")
    found.add_argument("--encoders", metavar="A,B", help="timm encoders in place of the scale's")
    found.add_argument("--wheels", type=Path, metavar="DIR", help="install libraries from wheels in DIR")
    found.add_argument("--minutes", type=float, default=9.0, help="time for --plan all and --tune (default: 9)")
    found.add_argument("--scale", choices=scales, default="quick", help="sizes and rounds (default: quick)")
    found.add_argument("--out", type=Path, default=OUT, help="folder of rows and logs (default: build/gpu)")
    found.add_argument("--archive", type=Path, metavar="FILE", help="all of it in one file (default: OUT.tar.gz)")


def lines_of(options: argparse.Namespace) -> list[tuple[Line, float]]:
    """Return the lines that are asked for, and when each must have ended, in seconds from the start.

    Raises:
        ValueError: for a name that no line has.
    """
    if options.tune:
        return [(TUNE, 60 * options.minutes)]
    if options.plan == "all":
        found = [line for line in EVERYTHING if not line.asked or line.name in (options.stages or ())]
    else:
        wheels = (WHEELS,) if options.wheels else ()
        parts = sorted(PARTS) if options.part is None else [options.part]
        found = [*wheels, *(line for part in parts for line in SHORT[part])]
    names = [line.name for line in (EVERYTHING if options.plan == "all" else found)]
    unknown = sorted(set(options.stages or ()) - set(names))
    if unknown:
        raise ValueError(f"no line is called {', '.join(unknown)}; choose from {', '.join(dict.fromkeys(names))}")
    if options.stages:
        found = [line for line in found if line.name in options.stages]
    if options.plan == "all":
        return [(line, 60 * options.minutes) for line in found]
    return list(zip(found, _ends(found), strict=True))


def _ends(lines: Sequence[Line]) -> Iterator[float]:
    """Yield when each line must have ended: its own seconds after the line before it."""
    end = 0.0
    for line in lines:
        end += line.seconds
        yield end


def gpu(options: argparse.Namespace, python: Sequence[str] = (sys.executable,)) -> int:
    """Run what is asked for until its time is up; return the exit status.

    Without a GPU only ``--scale tiny`` runs: a rehearsal of the suites.

    Args:
        options: see `add_options`.
        python: what starts every line: the interpreter, and what it is always started with.
    """
    if not has_gpu() and options.scale != "tiny":
        sys.stderr.write("python -m benchmarks gpu needs a CUDA device; on a CPU run pytest benchmarks/\n")
        return 2
    try:
        lines = lines_of(options)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    out = options.out.absolute()
    archive = (options.archive or out.with_name(out.name + ".tar.gz")).absolute()
    runner = Runner(out, archive, python, _filled(options, out))
    (out / "logs").mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(provenance(), indent=1))
    status, caches = 0, [_cached()]
    with signals_raise():
        try:
            _run(runner, lines, caches)
        except StoppedError as stopped:
            status = 128 + stopped.signum
        finally:
            _finish(runner, options, [line for line, _ in lines], caches)
    return status or int(not all(ended.well for ended in runner.ended))


def _run(runner: Runner, lines: Sequence[tuple[Line, float]], caches: list[int]) -> None:
    """Run the lines; those of a plan with one time for all are not begun when it is up."""
    began = time.monotonic()
    for line, end in lines:
        runner.run(line, end - (time.monotonic() - began))
        if line.name == "check":
            caches.append(_cached())


def _filled(options: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
    return {
        "{rows}": [str(out / "results" / folder_name())],
        "{scale}": [options.scale],
        "{encoders}": ["--encoders", options.encoders] if options.encoders else [],
        "{wheels}": [str(wheel) for wheel in wheels],
    }


def _cached() -> int:
    """Return how many folders the cache of compiled kernels has."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for entry in cache.iterdir() if entry.is_dir()) if cache.is_dir() else 0


def _finish(runner: Runner, options: argparse.Namespace, lines: Sequence[Line], caches: Sequence[int]) -> None:
    """Print and keep the last table: how each line ended, goals that rows can answer, and where all of it is."""
    folder = Path(runner.filled["{rows}"][0])
    ended = {found.line.name: found for found in runner.ended}
    counted = ", then ".join(map(str, caches))
    where = provenance()
    parts = [
        f"{where['device']}; {where['versions']}; commit {where['commit']}; {where['date']}",
        f"compiled kernels in Triton's cache before the first line, and after the check: {counted}",
        _ended_table(runner.ended),
        goal_table(folder),
    ]
    left = [line.name for line in lines if line.name not in ended or ended[line.name].how.startswith("not begun")]
    if left:
        parts.append(f"left for the next call: python -m benchmarks gpu {_again(options)}--stages {' '.join(left)}")
    text = "\n\n".join(filter(None, parts)) + "\n"
    (runner.out / "plan.md").write_text(text)
    pack(runner.out, runner.archive)
    sys.stdout.write(f"\n{text}\nrows: {folder}\nall of it: {runner.archive}\n")
    sys.stdout.flush()


def _again(options: argparse.Namespace) -> str:
    part = "" if options.part is None else f"--part {options.part} "
    return "" if options.plan == "all" else f"--plan short {part}"


def _ended_table(ended: Sequence[Ended]) -> str:
    rows = [f"| {e.line.name} | {e.seconds:.0f} s | {e.how} | {e.line.answers} |" for e in ended]
    return "\n".join(["| line | took | ended | question |", "|---|---|---|---|", *rows])
