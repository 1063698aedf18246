"""``python -m benchmarks COMMAND``: headline ratios, the report, the roofline, and all that a GPU can measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .gpu.stages import add_options, gpu
from .measure.scales import NAMES

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    found = commands.add_parser("headline", help="measure the README's headline ratios, in a few minutes")
    found.add_argument("--json", type=Path, metavar="FILE", help="write them there, too")
    found.add_argument("--scale", choices=NAMES, default="quick", help="sizes and rounds (default: quick)")
    commands.add_parser("report", help="render results/<device>/*.csv into docs/benchmarks.md and the README's table")
    found = commands.add_parser("roofline", help="measure both ceilings, and count what a step needs at least")
    found.add_argument("--encoder", default="resnet18", help="timm model (default: resnet18)")
    found.add_argument("--scale", choices=NAMES, default="quick", help="sizes (default: quick)")
    found = commands.add_parser("gpu", help="check and measure all that a GPU can, in calls of minutes")
    add_options(found, NAMES)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    options = parser().parse_args(argv)
    if options.command == "headline":
        from .reports.headline import headline

        return headline(options.json, options.scale)
    if options.command == "report":
        from .reports.report import report

        for path in report():
            sys.stdout.write(f"{path}\n")
        return 0
    if options.command == "roofline":
        from .reports.roofline import roofline

        return roofline(options.encoder, options.scale)
    return gpu(options)


if __name__ == "__main__":
    sys.exit(main())
