"""Write scores as JSON, as one tidy CSV, and as tables in Markdown."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatspark_fast.common.files import atomic_path
from spatspark_fast.scores.formulas import CATEGORICAL_SCORES

__all__ = [
    "UNITS",
    "lead_time_table",
    "markdown",
    "overall_table",
    "split_name",
    "threshold_table",
    "without_nan",
    "write_reports",
]

UNITS: Mapping[str, str] = {
    "mse": "1",
    "pmse": "(mm/5min)^2",
    "mae": "mm/h",
    "mean_error": "mm/h",
}
"""Units of the scores that have one; all others are pure numbers."""

# How far a score is from the best; the smallest cost wins.
_COST: Mapping[str, Callable[[float], float]] = {
    **dict.fromkeys(("mse", "pmse", "mae", "far"), lambda value: value),
    **dict.fromkeys(("accuracy", "precision", "recall", "f1", "csi", "hss", "fss"), lambda value: -value),
    "mean_error": abs,
    **dict.fromkeys(("bias", "small_scale_power"), lambda value: abs(value - 1)),
}

Scores = Mapping[str, Mapping[str, Any]]


def split_name(key: str) -> tuple[str, float | None, int | None]:
    """Split ``fss@0.5/15`` into score, threshold in mm/h and scale in pixels; None for what a score has not."""
    name, _, rest = key.partition("@")
    threshold, _, scale = rest.partition("/")
    return name, float(threshold) if threshold else None, int(scale) if scale else None


def write_reports(out: Path, about: Mapping[str, Any], scores: Scores) -> None:
    """Write ``scores.json``, ``scores.csv`` and ``scores.md`` into a folder, each completely or not at all."""
    content = {**about, "models": scores}
    with atomic_path(out / "scores.json") as path:
        path.write_text(json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")
    with atomic_path(out / "scores.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "lead_minutes", "score", "threshold_mm_per_hour", "scale_pixels", "value", "units"))
        writer.writerows(_rows(scores))
    with atomic_path(out / "scores.md") as path:
        path.write_text(markdown(about, scores))


def markdown(about: Mapping[str, Any], scores: Scores) -> str:
    """Return all tables: over all lead times, for each threshold, and by lead time."""
    first = next(iter(scores.values()))
    leads, windows = first["lead_minutes"], first["windows"]
    lines = [
        "# Scores",
        "",
        f"{windows} windows of `{about.get('data', '')}`, split `{about.get('split', '')}`, "
        f"lead times {leads[0]:g} to {leads[-1]:g} minutes, {about.get('region_words', '')}. "
        "The best value of each column is bold. `-`: undefined.",
        "",
        "## All lead times",
        "",
        *overall_table(scores),
        "",
    ]
    for threshold in first["thresholds_mm_per_hour"]:
        lines += [f"## Above {threshold:g} mm/h, all lead times", "", *threshold_table(scores, threshold), ""]
    for key in ("pmse", *(f"csi@{threshold:g}" for threshold in first["thresholds_mm_per_hour"])):
        name, threshold, _ = split_name(key)
        above = "" if threshold is None else f" above {threshold:g} mm/h"
        unit = f" in {UNITS[name]}" if name in UNITS else ""
        lines += [f"## {_title(name)}{above}{unit} by lead time", "", *lead_time_table(scores, key), ""]
    return "\n".join(lines)


def overall_table(scores: Scores) -> list[str]:
    """Return the table of what has no threshold, and of CSI, over all lead times."""
    first = next(iter(scores.values()))
    keys = [key for key in ("pmse", "mse", "mae", "mean_error", "small_scale_power") if key in first["all"]]
    keys += [f"csi@{threshold:g}" for threshold in first["thresholds_mm_per_hour"]]
    heads = []
    for key in keys:
        name, threshold, _ = split_name(key)
        heads.append(f"{_title(name)} {threshold:g}" if threshold is not None else _head(name))
    return _table(heads, {model: [found["all"][key] for key in keys] for model, found in scores.items()}, keys)


def threshold_table(scores: Scores, threshold: float) -> list[str]:
    """Return the table of the categorical scores and FSS at one threshold, over all lead times."""
    first = next(iter(scores.values()))
    keys = [f"{name}@{threshold:g}" for name in CATEGORICAL_SCORES]
    keys += [f"fss@{threshold:g}/{scale}" for scale in first["fss_scales_pixels"]]
    heads = [_title(name) for name in CATEGORICAL_SCORES]
    heads += [f"FSS {scale} px" for scale in first["fss_scales_pixels"]]
    return _table(heads, {model: [found["all"][key] for key in keys] for model, found in scores.items()}, keys)


def lead_time_table(scores: Scores, key: str) -> list[str]:
    """Return the table of one score by lead time."""
    leads = next(iter(scores.values()))["lead_minutes"]
    rows = {model: found["by_lead_time"][key] for model, found in scores.items()}
    return _table([f"{lead:g} min" for lead in leads], rows, [key] * len(leads))


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[float]], keys: Sequence[str]) -> list[str]:
    best = [_best([row[column] for row in rows.values()], split_name(key)[0]) for column, key in enumerate(keys)]
    lines = [f"| model | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for number, (model, row) in enumerate(rows.items()):
        cells = [
            f"**{_number(value)}**" if len(rows) > 1 and number in best[column] else _number(value)
            for column, value in enumerate(row)
        ]
        lines.append(f"| {model.replace('|', '/')} | {' | '.join(cells)} |")
    return lines


def _best(values: Sequence[float], name: str) -> set[int]:
    """Return the positions of the best values, by what is printed of them."""
    costs = {i: _COST[name](value) for i, value in enumerate(values) if not math.isnan(value)}
    least = _number(min(costs.values(), default=math.nan))
    return {i for i, cost in costs.items() if _number(cost) == least}


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if 0.0995 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _title(name: str) -> str:
    return name.upper() if name in ("csi", "far", "hss", "fss", "f1", "mse", "mae") else _head(name).split(" [")[0]


def _head(name: str) -> str:
    words = {"pmse": "pMSE", "mean_error": "mean error", "small_scale_power": "small-scale power"}
    unit = f" [{UNITS[name]}]" if UNITS.get(name, "1") != "1" else ""
    return words.get(name, name.upper() if name in ("mse", "mae") else name) + unit


def _rows(scores: Scores) -> Iterator[tuple[object, ...]]:
    for model, found in scores.items():
        for key, value in found["all"].items():
            yield from _row(model, "all", key, value)
        for key, values in found["by_lead_time"].items():
            for lead, value in zip(found["lead_minutes"], values, strict=True):
                yield from _row(model, f"{lead:g}", key, value)


def _row(model: str, lead: str, key: str, value: float) -> Iterator[tuple[object, ...]]:
    name, threshold, scale = split_name(key)
    blank = ["" if part is None else f"{part:g}" for part in (threshold, scale)]
    yield model, lead, name, *blank, "" if math.isnan(value) else f"{value:.8g}", UNITS.get(name, "1")


def without_nan(value: Any) -> Any:
    """Replace what is not finite by None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
