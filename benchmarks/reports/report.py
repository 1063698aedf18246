"""Render ``results/<device>/*.csv`` as tables and pictures: ``python -m benchmarks report``.

docs/benchmarks.md gets all tables of all devices, README.md one table of headline ratios. What lies between the markers
of both pages is replaced; the rest stays. A second run changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..measure.machine import RESULTS
from ..measure.rows import Row, read
from .markdown import wrapped
from .plots import PLOTS
from .summary import NOTE, device_summary
from .tables import device_page

__all__ = [
    "HEADLINE",
    "MEASURED",
    "blocks",
    "devices",
    "fill",
    "markers",
    "newest",
    "read_folder",
    "report",
    "summaries",
]

ROOT = Path(__file__).parents[2]
MEASURED, HEADLINE = "measured", "headline"  # names of the regions of docs/benchmarks.md and of README.md
LARGEST = 150_000  # bytes of a picture
NO_GPU = "### GPU\n\nNever run on a GPU: there is no figure of one. `python -m benchmarks gpu` writes them."
TITLES = {
    "speed": "Speed over plain dense against the masked share",
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


def markers(region: str) -> tuple[str, str]:
    """Return the lines before and after a region of a page."""
    return f"<!-- {region}: written by `python -m benchmarks report`, do not edit -->", f"<!-- end of {region} -->"


def fill(page: str, region: str, block: str) -> str:
    """Return a page with ``block`` between the markers of a region.

    Raises:
        ValueError: if the page has not both markers once, in order.
    """
    begin, end = markers(region)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must hold the lines {begin!r} and {end!r} once each, in this order")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{block.strip()}\n\n{end}{rest.split(end)[1]}"


def picture_names(name: str, rows: Sequence[Row]) -> dict[str, str]:
    """Return the file name of each picture that the rows of a device can be drawn as."""
    return {plot: f"{plot}-{name}.svg" for plot, (suite, _) in PLOTS.items() if any(r["suite"] == suite for r in rows)}


def blocks(found: dict[str, list[Row]]) -> dict[str, str]:
    """Return what docs/benchmarks.md shows of each device, and that there is no GPU, if there is none."""
    pages = {
        name: device_page(name, rows, "../benchmarks/results", _links(picture_names(name, rows)))
        for name, rows in found.items()
    }
    return pages if any(_is_gpu(rows) for rows in found.values()) else {"": NO_GPU, **pages}


def summaries(found: dict[str, list[Row]]) -> dict[str, str]:
    """Return what the README shows of each device."""
    return {name: device_summary(name, rows, "benchmarks/results") for name, rows in found.items()}


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
    for page, region, parts in (
        ("docs/benchmarks.md", MEASURED, [*blocks(found).values()]),
        ("README.md", HEADLINE, [*summaries(newest(found)).values(), wrapped(NOTE)]),
    ):
        path = root / page
        path.write_text(fill(path.read_text(), region, "\n\n".join(parts)))
        written.append(path)
    return written


def _drawn(draw: Callable[[Sequence[Row], Path], None], rows: Sequence[Row], path: Path) -> Path:
    """Draw a picture and return its path; raise ValueError if it is too large to commit."""
    draw(rows, path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than {LARGEST}")
    return path
