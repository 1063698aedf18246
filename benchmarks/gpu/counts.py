"""Print all that can be counted of a GPU run without a GPU: ``python -m benchmarks.gpu.counts [--against DIR]``.

Runs those files of this folder that count on a fake card, each in a process of its own: `host.py` (host time of eager
operators), `step.py` (what a training step starts, and its host time) and `passes.py` (what norms move). Their tables
are printed as they come; ``--json`` keeps all lines. Times in them are of the host, not of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["COUNTED", "main", "rows_of"]

ROOT = Path(__file__).parents[2]
COUNTED = {"host": True, "step": True, "passes": False}  # and whether it takes another checkout


def rows_of(text: str) -> list[dict[str, str]]:
    """Return the lines of the markdown tables in a text, each by the heads of its columns."""
    rows: list[dict[str, str]] = []
    heads: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
        elif set(line) - set("|-: "):
            rows.append(dict(zip(heads, cells, strict=True)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run all counts; return the exit status, 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counts", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="root of another checkout, the one before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all lines of the tables there, too")
    parser.add_argument("--only", nargs="+", choices=COUNTED, default=[*COUNTED], help="some of the counts")
    options = parser.parse_args(argv)
    against = [] if options.against is None else ["--against", str(options.against.absolute())]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    found: dict[str, list[dict[str, str]]] = {}
    status = 0
    for name in options.only:
        command = [sys.executable, "-m", f"benchmarks.gpu.{name}", *(against if COUNTED[name] else [])]
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        sys.stdout.write(f"{run.stdout}\n")
        sys.stdout.flush()
        found[name], status = rows_of(run.stdout), status or run.returncode
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
