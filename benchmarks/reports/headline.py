"""The ratios of the README's table, but for MinkowskiEngine's: ``python -m benchmarks headline --json FILE``.

Runs the suites that hold them (a few minutes) and picks their rows, so that there is one way to measure a thing. The
file holds ``{name: {"ratio": median, "low": ..., "high": ..., "config": ...}}``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..measure.rows import Row
from .report import read_folder

__all__ = ["headline", "headlines", "name_of"]

HERE = Path(__file__).parents[1]
SUITES = (
    "test_conv.py::test_conv3x3",
    "test_encoder.py",
    "test_step.py::test_step",
    "test_memory.py::test_step_memory",
)
RIVALS = {
    "conv": ("dense",),
    "encoder": ("dense", "dense-and-mask"),
    "step": ("published", "dense"),
    "step_memory": ("published", "dense"),
}


def name_of(row: Row) -> str:
    """Return the name of a headline: what is how much faster, or smaller, than what."""
    what = row["case"].split(" batch")[0]
    return f"{row['suite']}: {what}, {float(row['masked']):.0%} masked, {row['way']} over {row['against']}"


def headlines(rows: Iterable[Row]) -> dict[str, dict[str, object]]:
    """Return the headlines among some rows: of layers all three passes together, of memory bytes."""
    found: dict[str, dict[str, object]] = {}
    for row in rows:
        if row["against"] not in RIVALS.get(row["suite"], ()) or not row["masked"]:
            continue
        if row["suite"] == "conv" and not row["case"].endswith(" all"):
            continue
        config = "; ".join(
            [row["case"], f"{row['threads']} threads", row["device"], row["versions"], f"commit {row['commit']}"]
        )
        numbers = {name: float(row[name]) for name in ("ratio", "low", "high")}
        found[name_of(row)] = {**numbers, "config": config}
    return found


def headline(target: Path | None, scale: str) -> int:
    """Run the suites, print the headlines, and write them to ``target`` if there is one.

    Returns the exit status, nonzero if any parity check failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(HERE / suite) for suite in SUITES]
        command = [sys.executable, "-m", "pytest", *paths, "--scale", scale, "--results", folder, "-q"]
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        found = headlines(read_folder(Path(folder)))
    if status:
        sys.stderr.write("a benchmark failed, see above: there is no headline\n")
        return status
    if target is not None:
        target.write_text(json.dumps(found, indent=1) + "\n")
    for name, values in found.items():
        sys.stdout.write(f"{values['ratio']:6.2f}x ({values['low']:.2f}-{values['high']:.2f})  {name}\n")
    return 0
