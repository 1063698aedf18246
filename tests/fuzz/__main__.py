"""Try damaged and hostile inputs, and count what becomes of them: ``python -m tests.fuzz``.

Input N of a suite is drawn from the number N alone, so ``python -m tests.fuzz nl50 --only N`` tries it again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from .outcomes import BAD, OUTCOMES, Suite
from .running import Limits, prepared, tried

# Suites, and their share of the inputs.
SUITES = {"nl50": 5, "checkpoints": 3, "commands": 4, "kernels": 7, "nowcast": 1, "radar": 1}
SHOWN = 5  # seeds that are listed of one failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if any input had a bad outcome."""
    options = _parser().parse_args(argv)
    limits = Limits(seconds=options.limit)
    counts: dict[str, Counter[str]] = {}
    failures: dict[tuple[str, str, str], list[int]] = {}
    shares = {name: SUITES[name] for name in options.suites or SUITES}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for name, share in shares.items():
            part = share / sum(shares.values())
            suite, folder = suite_of(name), Path(place) / name
            prepared(suite, folder)
            counts[name], begun = Counter(), time.monotonic()
            seeds = _seeds(options, part)
            for seed, verdict in tried(name, suite, folder, seeds, options.jobs, limits):
                counts[name][verdict.outcome] += 1
                if verdict.outcome in BAD:
                    failures.setdefault((name, verdict.outcome, verdict.what), []).append(seed)
                if options.only or options.verbose:
                    sys.stdout.write(f"{name} {seed}: {verdict.outcome} {verdict.what}\n")
            sys.stderr.write(f"{name}: {counts[name].total()} inputs in {time.monotonic() - begun:.0f} s\n")
    sys.stdout.write("\n".join([*table(counts), *listed(failures)]) + "\n")
    return 1 if failures else 0


def suite_of(name: str) -> Suite:
    """Import a suite; the parent process computes nothing, so that its children can be forked."""
    return import_module(f"{__package__}.{name}").SUITE


def table(counts: dict[str, Counter[str]]) -> list[str]:
    """Return the lines of a table of inputs by suite and outcome."""
    head = ["inputs", "tried", *OUTCOMES]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    total = sum(counts.values(), Counter())
    for name, found in [*counts.items(), ("all", total)]:
        rows.append([name, str(found.total()), *(str(found[outcome]) for outcome in OUTCOMES)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def listed(failures: dict[tuple[str, str, str], list[int]]) -> list[str]:
    """Return a line for each kind of failure, with the first seeds that show it."""
    lines = []
    for (name, outcome, what), seeds in sorted(failures.items(), key=lambda item: -len(item[1])):
        shown = " ".join(map(str, seeds[:SHOWN]))
        lines.append(f"{len(seeds):5d}  {outcome}: {what}\n       python -m tests.fuzz {name} --only {shown}")
    return lines


def _seeds(options: argparse.Namespace, part: float) -> Iterator[int]:
    if options.only:
        yield from options.only
        return
    count = None if options.minutes else max(1, round(options.count * part))
    end = time.monotonic() + 60 * (options.minutes or 0) * part
    for seed in itertools.count(options.seed):
        if (count is None and time.monotonic() > end) or (count is not None and seed >= options.seed + count):
            return
        yield seed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])  # pyright: ignore
    add = parser.add_argument
    add("suites", nargs="*", choices=[*SUITES, []], metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    add("--count", type=int, default=1000, help="inputs in all (default: %(default)s)")
    add("--minutes", type=float, help="time in all, instead of a count")
    add("--seed", type=int, default=0, help="number of the first input of each suite (default: %(default)s)")
    add("--only", type=int, nargs="+", metavar="N", help="numbers of the inputs to try, nothing else")
    add("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    add("--limit", type=float, default=Limits.seconds, help="seconds after which an input hangs (default: %(default)s)")
    add("--verbose", action="store_true", help="a line for each input")
    return parser


if __name__ == "__main__":
    sys.exit(main())
