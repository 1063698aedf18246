"""One table for all benchmarks: a row is a ratio with its spread, both values, and where they come from."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .machine import provenance
from .timing import GATE, Ratio

__all__ = ["COLUMNS", "LEFT_OUT", "Row", "left_out", "line", "make_row", "merge", "read", "words"]

COLUMNS: tuple[str, ...] = (
    "suite", "case", "masked", "way", "against", "ratio", "low", "high", "value", "against_value", "unit",
    "limit", "floor", "parity", "device", "cpu", "threads", "versions", "commit", "command", "date", "reason",
)  # fmt: skip
KEY = ("suite", "case", "masked", "way", "against", "unit")
LEFT_OUT = "left_out"  # the suite of rows that say why something was not measured

Row = dict[str, str]


def make_row(
    suite: str,
    case: str,
    way: str,
    against: str,
    ratio: Ratio,
    values: tuple[float, float],
    unit: str,
    *,
    masked: float | None = None,
    limit: float | None = None,
    floor: float | None = None,
) -> Row:
    """Return a row of the table.

    Args:
        suite: name of the file that the row is written to.
        case: what was measured.
        way: the way that the ratio speaks for.
        against: its rival.
        ratio: of ``against`` to ``way``: above 1 ``way`` is faster, or smaller.
        values: medians of ``way`` and ``against``, in ``unit``.
        unit: of the values and the floor.
        masked: hidden share of the patches.
        limit: the ratio if every product with an inactive pixel were left out of direct convolution.
        floor: the least that ``way`` could take on this machine, in ``unit`` (:mod:`~benchmarks.measure.ceilings`).

    Raises:
        AssertionError: if no parity check has passed: no figure of an unchecked result.
    """
    numbers = (ratio.median, ratio.low, ratio.high)
    found = {
        "suite": suite, "case": case, "masked": "" if masked is None else f"{masked:g}", "way": way, "against": against,
        **{name: f"{number:.4g}" for name, number in zip(("ratio", "low", "high"), numbers, strict=True)},
        "value": f"{values[0]:.4g}", "against_value": f"{values[1]:.4g}", "unit": unit,
        "limit": "" if limit is None else f"{limit:.4g}", "floor": "" if floor is None else f"{floor:.4g}",
        "parity": f"{GATE.worst():.1e}", **provenance(), "reason": "",
    }  # fmt: skip
    return {name: found[name] for name in COLUMNS}


def left_out(case: str, way: str, reason: str, masked: float | None = None) -> Row:
    """Return a row that says in one sentence why a way of a case has no figure."""
    known = {"suite": LEFT_OUT, "case": case, "masked": "" if masked is None else f"{masked:g}", "way": way}
    found = known | provenance() | {"reason": " ".join(reason.split())[:300]}
    return {name: found.get(name, "") for name in COLUMNS}


def line(row: Mapping[str, str]) -> str:
    """Return a row as a line for a terminal."""
    if row["suite"] == LEFT_OUT:
        return f"left out  {row['way']}, {row['case']}: {row['reason']}"
    masked = f"{float(row['masked']):.0%} masked" if row["masked"] else ""
    limit = f", limit {row['limit']}x" if row["limit"] else ""
    return (
        f"{row['suite']:10} {row['case']:44} {masked:10} {row['way']:16} {float(row['ratio']):7.2f}x "
        f"({float(row['low']):.2f}-{float(row['high']):.2f}) {row['against']}, {row['value']} {row['unit']}{limit}"
    )


def words(case: str) -> str:
    """Return the name of a case for readers: a shape as `convolutions.Shape` prints it, in words."""
    found = re.match(r"(\d+x\d+) s(\d+) p(\d+) C(\d+)-(\d+) g(\d+)(.*)", case)
    if not found:
        return re.sub(",? batch", ", batch", case)
    kernel, stride, p, inputs, outputs, groups, rest = found.groups()
    kind = kernel if groups == "1" else f"{kernel} depthwise"
    channels = inputs if inputs == outputs else f"{inputs} to {outputs}"
    strided = "" if stride == "1" else f", stride {stride}"
    return f"{kind}{strided}, {channels} channels, patches of {p}x{p}{rest}"


def read(path: Path) -> list[Row]:
    """Return the rows of a table; columns that it lacks are empty."""
    with path.open(newline="") as file:
        return [{name: found.get(name) or "" for name in COLUMNS} for found in csv.DictReader(file)]


def merge(rows: Iterable[Row], folder: Path) -> None:
    """Write rows to ``folder/SUITE.csv``; they replace those of the same case, and others stay."""
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for suite in sorted({row["suite"] for row in rows}):
        path = folder / f"{suite}.csv"
        merged = {_key(row): row for row in (read(path) if path.exists() else [])}
        merged |= {_key(row): row for row in rows if row["suite"] == suite}
        fresh = path.with_suffix(".csv.new")  # whoever is killed here leaves the table as it was
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged.values())
        fresh.replace(path)


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)
