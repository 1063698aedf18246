"""Run the short plan on a fake GPU, at real sizes: ``python -m benchmarks.gpu.rehearse``.

Every line of the plan (``plan.py``) runs as it will on the card, in processes that `benchmarks.gpu.fake` starts: all of
its Python code, every shape, every kernel that it will need. Nothing is computed and no time means anything; what it
prints and writes goes into a folder that is deleted. What remains is a list of failures, and Triton's cache. Packed and
unpacked at the same absolute path on a machine with the same wheel of Triton, the card compiles nothing.

The plan runs twice: in the second run every kernel must be found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

from ..measure.machine import folder_name
from .fake_cards import CARDS
from .plan import SHORT, Line
from .runner import Ended, Runner, pack

__all__ = ["Rehearsed", "main", "rehearse", "report"]

LIMIT = 3600.0  # seconds of a line, which compiles
CACHE = Path.home() / ".triton" / "cache"
# What the compiler writes on its way, nine tenths of a cache: a card starts kernels without it.
STEPS_BETWEEN = frozenset({".source", ".ttir", ".ttgir", ".llir", ".ptx"})


@dataclass(frozen=True)
class Rehearsed:
    """A line that was rehearsed.

    Attributes:
        ended: how it ended.
        keys: of all its kernels, those that were in the cache and those that were not.
        missed: keys of those that were compiled.
        seconds: of the compiler.
        launches: of kernels.
        tail: the end of its log.
    """

    ended: Ended
    keys: frozenset[str]
    missed: frozenset[str]
    seconds: float
    launches: int
    tail: str


def bare(line: Line) -> Line:
    """Return a line without the program around it, a profiler or a sanitizer, which needs a card."""
    if line.needs in ("", "wheels"):
        return line
    return replace(line, command=line.command[line.command.index("{python}") :], needs="")


def rehearse(lines: Sequence[Line], card: str, cache: Path, out: Path, dry: bool = False) -> list[Rehearsed]:
    """Run lines on a fake card and return what became of each.

    Args:
        lines: of a plan.
        card: a key of ``CARDS``.
        cache: Triton's cache.
        out: folder for what the lines write.
        dry: compile nothing.
    """
    logs = out / "fake"
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    python = (
        sys.executable,
        "-m",
        "benchmarks.gpu.fake",
        "--card",
        card,
        "--log",
        str(logs),
        *(["--dry"] if dry else []),
    )
    rows = [str(out / "results" / folder_name(CARDS[card].name))]
    filled = {"{rows}": rows, "{scale}": ["quick"], "{encoders}": [], "{wheels}": []}
    runner = Runner(out, out.with_name(out.name + ".tar.gz"), python, filled)
    found = []
    for line in map(bare, lines):
        before = set(logs.glob("*.json"))
        ended = runner.run(line, LIMIT)
        seen = [json.loads(path.read_text()) for path in set(logs.glob("*.json")) - before]
        found.append(_rehearsed(ended, seen, out / "logs" / f"{line.name}.log"))
    return found


def _rehearsed(ended: Ended, seen: Sequence[dict[str, Any]], log: Path) -> Rehearsed:
    kernels = [kernel for process in seen for kernel in process["compiled"]]
    missed = [kernel for kernel in kernels if not kernel["cached"]]
    return Rehearsed(
        ended,
        frozenset(kernel["key"] for kernel in kernels),
        frozenset(kernel["key"] for kernel in missed),
        sum(kernel["seconds"] for kernel in missed),
        sum(count for process in seen for count in process["launches"].values()),
        "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "",
    )


def report(runs: Sequence[Sequence[Rehearsed]], cache: Path) -> tuple[str, bool]:
    """Return a table of one or two runs with all failures, and whether there are none.

    Args:
        runs: the first one, and the second one if there was one.
        cache: Triton's cache.
    """
    lines = [
        "| line | ended | kernels | compiled | compiler | launches | compiled again |",
        "|---|---|---|---|---|---|---|",
    ]
    again = {r.ended.line.name: str(len(r.missed)) for r in runs[1]} if len(runs) > 1 else {}
    for r in runs[0]:
        name = r.ended.line.name
        lines.append(
            f"| {name} | {r.ended.how} | {len(r.keys)} | {len(r.missed)} | {r.seconds:.0f} s | {r.launches} "
            f"| {again.get(name, '-')} |"
        )
    bad = [r for run in runs for r in run if not r.ended.well]
    lines += [f"\nFAILED {r.ended.line.name}: {r.ended.how}\n{r.tail}" for r in bad]
    keys = frozenset[str]().union(*(r.keys for run in runs for r in run))
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    lines.append(f"\n{len(keys)} kernels; the cache has {size / 1e6:.0f} MB and is {cache}")
    missed = sum(len(r.missed) for r in runs[1]) if len(runs) > 1 else 0
    if len(runs) > 1:
        lines.append(f"second run: {missed} kernels compiled" + (", all found" if not missed else "  WRONG"))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    lines.append(f"it serves where TRITON_CACHE_DIR={cache} and Triton is the wheel {triton.__version__} of {python}")
    return "\n".join(lines) + "\n", not bad and not missed


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.rehearse", description=__doc__)
    parser.add_argument("--part", type=int, choices=sorted(SHORT), help="of the short plan; default all")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="some lines of it")
    parser.add_argument("--lines", type=int, metavar="N", help="only the first N lines")
    parser.add_argument("--card", choices=CARDS, default="h100", help="what to pretend (default: h100)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="Triton's cache (default: ~/.triton/cache)")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="pack the cache into a .tar.gz")
    parser.add_argument("--dry", action="store_true", help="compile nothing: only list what fails")
    parser.add_argument("--once", action="store_true", help="do not run the plan again to see that all is found")
    options = parser.parse_args(argv)
    parts = sorted(SHORT) if options.part is None else [options.part]
    chosen = [line for part in parts for line in SHORT[part]]
    if options.stages:
        chosen = [line for line in chosen if line.name in options.stages]
    lines, cache = chosen[: options.lines], options.cache.absolute()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        count = 1 if options.once or options.dry else 2
        outs = [Path(folder, str(number)) for number in range(count)]
        runs = [rehearse(lines, options.card, cache, out, options.dry) for out in outs]
    text, good = report(runs, cache)
    sys.stdout.write(f"\n{text}")
    if options.pack is not None:
        pack(cache, options.pack, STEPS_BETWEEN)
        sys.stdout.write(f"{options.pack}: {options.pack.stat().st_size / 1e6:.0f} MB\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
