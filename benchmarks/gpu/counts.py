"""Print what a GPU run costs the host, counted on a fake card: ``python -m benchmarks.gpu.counts``.

With ``--against DIR`` the same is asked of another checkout, in turn and in processes of their own, and each line gives
before, after and their ratio. Counts are those of hollow tensors at real sizes. Times are of the processor, of the
quietest of several rounds, and not of a GPU (`costs.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

__all__ = ["main", "table"]

ROOT = Path(__file__).parents[2]
# The packages are those of a checkout, what asks them is this file's.
ASK = """
import sys
sys.path[:0] = [f"{sys.argv[1]}/kernels", sys.argv[1]]
import patchsparse, spatspark_fast
sys.path[:2] = [sys.argv[2]]
from benchmarks.gpu.counts import tell
tell()
"""
Figures = dict[str, tuple[float, str]]


def tell() -> None:
    """Print the figures of the packages that are imported as JSON, for the process that asked."""
    from .costs import costs

    sys.stdout.write(json.dumps([asdict(cost) for cost in costs()]) + "\n")


def ask(checkout: Path) -> Figures:
    """Return the figures of a checkout and their units, from a process of its own.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    command = [sys.executable, "-c", ASK, str(checkout), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{checkout} cannot be counted: {run.stderr[-2000:]}")
    return {cost["what"]: (cost["value"], cost["unit"]) for cost in json.loads(run.stdout.splitlines()[-1])}


def quietest(rounds: Sequence[Figures]) -> Figures:
    """Return the least value of each figure."""
    return {what: (min(found[what][0] for found in rounds), unit) for what, (_, unit) in rounds[0].items()}


def table(after: Mapping[str, tuple[float, str]], before: Mapping[str, tuple[float, str]] | None) -> str:
    """Return a markdown table; ``before`` is the other checkout's, and its ratio is ``before / after``."""
    if before is None:
        lines = ["| what | here |", "|---|---|"]
        return "\n".join([*lines, *(f"| {what} | {_said(*figure)} |" for what, figure in after.items())]) + "\n"
    lines = ["| what | before | after | ratio |", "|---|---|---|---|"]
    for what, figure in after.items():
        if what in before:
            ratio = f"{before[what][0] / figure[0]:.2f}" if figure[0] else "-"
            lines.append(f"| {what} | {_said(*before[what])} | {_said(*figure)} | {ratio} |")
        else:
            lines.append(f"| {what} | - | {_said(*figure)} | - |")
    return "\n".join(lines) + "\n"


def _said(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "launches" else f"{value:.3g} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print and write; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counts", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, which is the one before")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each checkout (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    checkouts = {"after": ROOT} | ({} if options.against is None else {"before": options.against.absolute()})
    rounds: dict[str, list[Figures]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            rounds[name].append(ask(checkout))
    found = {name: quietest(figures) for name, figures in rounds.items()}
    sys.stdout.write(table(found["after"], found.get("before")))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
