"""Mean and spread of scores over seeds, as a table that says what was compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

__all__ = ["Results", "markdown", "mean_and_spread", "paired_differences"]

Results = dict[str, dict[str, dict[str, float]]]
"""Scores by model, seed ("-" where none plays a part) and name of the score."""

SMALLER_IS_BETTER = ("pmse",)
NEAREST_TO_ONE = ("bias",)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is NaN for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired_differences(
    ours: Mapping[str, Mapping[str, float]], reference: Mapping[str, Mapping[str, float]], score: str
) -> list[float]:
    """Return ours minus reference for every seed that both have."""
    return [ours[seed][score] - reference[seed][score] for seed in ours if seed in reference]


def markdown(results: Results, pairs: Sequence[tuple[str, str]], scores: Sequence[str]) -> str:
    """Return a table of means ± standard deviations over seeds, and one of differences at equal seeds."""
    head = " | ".join(_title(score) for score in scores)
    lines = [
        "Test split, all lead times and pixels with data; mean ± standard deviation over seeds. `-`: undefined.",
        "",
        f"| model | runs | {head} |",
        f"|---|---|{'---|' * len(scores)}",
    ]
    for name, runs in results.items():
        cells = [_cell([run[score] for run in runs.values()], score) for score in scores]
        count = "-" if "-" in runs else str(len(runs))
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    rows = [row for ours, theirs in pairs if (row := _difference_row(results, ours, theirs, scores))]
    if rows:
        lines += ["", "Differences at equal seeds, and in how many of them the first is the better one:", ""]
        lines += [f"| difference | {head} |", f"|---|{'---|' * len(scores)}", *rows]
    return "\n".join(lines) + "\n"


def _difference_row(results: Results, ours: str, theirs: str, scores: Sequence[str]) -> str | None:
    if ours not in results or theirs not in results:
        return None
    cells = []
    for score in scores:
        differences = paired_differences(results[ours], results[theirs], score)
        if not differences:
            return None
        cells.append(_cell(differences, score, signed=True) + _wins(results[ours], results[theirs], score))
    return f"| {ours} - {theirs} | {' | '.join(cells)} |"


def _wins(ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]], score: str) -> str:
    common = [seed for seed in ours if seed in theirs]
    wins = sum(_cost(ours[seed][score], score) < _cost(theirs[seed][score], score) for seed in common)
    return f" ({wins} of {len(common)})"


def _cost(value: float, score: str) -> float:
    name = score.split("@")[0]
    if name in NEAREST_TO_ONE:
        return abs(value - 1)
    return value if name in SMALLER_IS_BETTER else -value


def _cell(values: Sequence[float], score: str, signed: bool = False) -> str:
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return "-"
    digits = 5 if score == "pmse" else 4
    shown = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return shown if math.isnan(spread) else f"{shown} ± {spread:.{digits}f}"


def _title(score: str) -> str:
    name, _, threshold = score.partition("@")
    title = {"pmse": "pMSE [(mm/5min)²]", "bias": "bias"}.get(name, name.upper())
    return f"{title} {threshold} mm/h" if threshold else title
