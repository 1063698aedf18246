"""Rows as cells and tables of markdown, and where the figures of a device come from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from ..measure.rows import Row

__all__ = ["distinct", "find", "hardest", "is_dense", "of_suite", "origin", "percent", "ratio_cell", "table", "wrapped"]

WIDTH = 120


def of_suite(rows: Iterable[Row], suite: str) -> list[Row]:
    """Return the rows of one suite."""
    return [row for row in rows if row["suite"] == suite]


def find(rows: Iterable[Row], **wanted: str) -> Row | None:
    """Return the first row that has these values, or None."""
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def distinct(rows: Iterable[Row], *names: str) -> list[tuple[str, ...]]:
    """Return the different values of some columns, in the order they come in."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def is_dense(way: str) -> bool:
    """Whether a way computes whole images and ignores the mask, eager, captured or compiled."""
    return way.split(" ")[0] == "dense"


def hardest(rows: Iterable[Row], **wanted: str) -> Row | None:
    """Return the row of the fastest dense rival."""
    found = [row for row in rows if wanted.items() <= row.items() and is_dense(row["against"])]
    return min(found, key=lambda row: float(row["ratio"]), default=None)


def ratio_cell(row: Row | None, absent: str = "not measured") -> str:
    """Return a ratio with its quartiles, as a cell."""
    if row is None:
        return absent
    ratio, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
    digits = 1 if ratio >= 10 else 2
    spread = "" if low == high else f" ({low:.{digits}f}-{high:.{digits}f})"
    return f"{ratio:.{digits}f}x{spread}"


def percent(masked: str) -> str:
    """Return a masked share as a cell; empty if there is none."""
    return f"{float(masked):.0%}".replace("%", " %") if masked else ""


def wrapped(text: str) -> str:
    """Return a paragraph in lines that fit the page; links and names stay whole."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table under its title; nothing if it has no lines."""
    if not lines:
        return ""
    rows = [f"| {' | '.join(cells)} |" for cells in (header, *lines)]
    rows.insert(1, f"|{'---|' * len(header)}")
    return "\n".join([wrapped(title), "", *rows])


def origin(name: str, rows: Sequence[Row], results: str) -> str:
    """Return where the figures of a device come from: machine, versions, commits, date and the folder of the rows."""
    newest = max(rows, key=lambda row: row["date"])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    versions = ", ".join(dict.fromkeys(row["versions"] for row in rows))
    when = f", {newest['date'][:10]}" if newest["date"] else ""
    return (
        f"{newest['device']}, {newest['threads']} threads; {versions}; commit {commits}{when}. "
        f"Rows: [{name}]({results}/{name})."
    )
