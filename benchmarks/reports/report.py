"""Render ``results/<device>/*.csv`` as tables and pictures: ``python -m benchmarks report``.

What lies between the markers in README.md and docs/benchmarks.md is replaced; the rest of both pages stays. A second
run changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..measure.machine import RESULTS
from ..measure.rows import Row, read
from . import tables
from .plots import PLOTS

__all__ = ["BEGIN", "END", "blocks", "devices", "fill", "newest", "read_folder", "report", "summaries"]

ROOT = Path(__file__).parents[2]
BEGIN = "<!-- measured: written by `python -m benchmarks report`, do not edit -->"
END = "<!-- end of measured -->"
LARGEST = 150_000  # bytes of a picture
TITLES = {
    "speed": "Speed over plain dense against the masked share, with the limits of direct convolution",
    "split": "Where the time of a training step goes",
    "memory": "Peak memory of a training step",
}


def read_folder(folder: Path) -> list[Row]:
    """Return the rows of all suites of a device."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path)]


def devices(results: Path) -> dict[str, list[Row]]:
    """Return the rows of each folder, the newest measured first."""
    found = {folder.name: read_folder(folder) for folder in sorted(results.iterdir()) if folder.is_dir()}
    found = {name: rows for name, rows in found.items() if rows}
    return dict(sorted(found.items(), key=lambda item: _date(item[1]), reverse=True))


def _date(rows: Sequence[Row]) -> str:
    return max(row["date"] for row in rows)


def _is_gpu(rows: Sequence[Row]) -> bool:
    return all(row["device"] != row["cpu"] and "cores" not in row["device"] for row in rows)


def newest(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the newest CPU and the newest GPU whose encoders were measured: those the README shows."""
    chosen: dict[bool, str] = {}
    for name, rows in found.items():
        if any(row["suite"] == "encoder" for row in rows):
            chosen.setdefault(_is_gpu(rows), name)
    return {name: rows for name, rows in found.items() if name in chosen.values()}


def fill(page: str, block: str) -> str:
    """Return a page with ``block`` between its markers; raise ValueError if it has not both, in order, once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold the lines {BEGIN!r} and {END!r} once each, in this order")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{block.strip()}\n\n{END}{rest.split(END)[1]}"


def picture_names(name: str, rows: Sequence[Row]) -> dict[str, str]:
    """Return the file name of each picture that the rows of a device can be drawn as."""
    return {plot: f"{plot}-{name}.svg" for plot, (suite, _) in PLOTS.items() if any(r["suite"] == suite for r in rows)}


def blocks(found: dict[str, list[Row]]) -> dict[str, str]:
    """Return what docs/benchmarks.md shows of each device."""
    return {
        name: tables.device_page(name, rows, "../benchmarks/results", _links(picture_names(name, rows)))
        for name, rows in found.items()
    }


def summaries(found: dict[str, list[Row]]) -> dict[str, str]:
    """Return what the README shows of each device."""
    return {name: tables.device_summary(name, rows, "benchmarks/results") for name, rows in found.items()}


def _links(names: dict[str, str]) -> list[str]:
    return [f"![{TITLES[plot]}](figures/{name})" for plot, name in names.items()]


def report(results: Path = RESULTS, root: Path = ROOT) -> list[Path]:
    """Write pictures and pages; return the files that were written."""
    found = devices(results)
    figures = root / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in found.items():
        for plot, file in picture_names(name, rows).items():
            written.append(_drawn(PLOTS[plot][1], rows, figures / file))
    pages = {"docs/benchmarks.md": blocks(found), "README.md": summaries(newest(found))}
    for page, parts in pages.items():
        path = root / page
        path.write_text(fill(path.read_text(), "\n\n".join(parts.values())))
        written.append(path)
    return written


def _drawn(draw: Callable[[Sequence[Row], Path], None], rows: Sequence[Row], path: Path) -> Path:
    """Draw a picture and return its path; raise ValueError if it is too large to commit."""
    draw(rows, path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than {LARGEST}")
    return path
