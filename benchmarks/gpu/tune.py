"""Measure configurations for the layers of ResNets and ConvNeXts, and write the table that ships with the package.

``python -m benchmarks gpu --tune``. The table is ``kernels/patchsparse/backends/triton/tuned.json``; a copy lies beside
the rows, since the machine with the GPU may be another one than that of the repository. Entries of other cards and
other kinds of call stay. Only a configuration that is faster than the default by more than `WORTH` is entered.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from patchsparse.backends.triton import tuned, tuning

from ..measure.device import aside, device, has_gpu
from ..measure.machine import RESULTS, folder_name, provenance
from ..subjects.convolutions import GROUPS, Shape, operators, problem

__all__ = ["BATCHES", "MASKED", "entry_of", "keep", "keep_all", "main", "shapes"]

MASKED = (0.6, 0.75, 0.3)
BATCHES = (128, 32)
WORTH = 0.03  # share of the default's time
# 3x3 layers behind a ResNet-50's bottlenecks are those of a ResNet-18; a ConvNeXt downsamples by 2x2, which is local.
LAYERS = ("3x3", "stride2", "stem")
NAME = "tuned.json"


def shapes() -> Iterator[tuple[Shape, float, int]]:
    """Yield shapes, masked shares and batches, what is met most first."""
    for batch in BATCHES:
        for masked in MASKED:
            yield from ((shape, masked, batch) for name in LAYERS for shape in GROUPS[name])


def entry_of(measured: Sequence[tuning.Measured]) -> tuned.Entry | None:
    """Return what the table says of a kind of call, its default measured first; None if the default is as good."""
    default, fastest = measured[0], min(measured, key=lambda m: m.seconds)
    if not fastest.seconds < default.seconds * (1 - WORTH):
        return None
    return tuned.Entry(asdict(fastest.config), round(fastest.seconds * 1e3, 5), round(default.seconds * 1e3, 5), 0)


def measure(seconds: float, where: str) -> Iterator[tuple[tuned.Kind, Sequence[tuning.Measured]]]:
    """Yield each kind of call with what was measured of its configurations, until the time is up."""
    began = time.monotonic()
    with tuning.tune() as tuner:
        for shape, masked, batch in shapes():
            if time.monotonic() - began > seconds:
                sys.stdout.write(f"out of time before {shape}, {masked:.0%} masked, batch {batch}\n")
                return
            known = set(tuner.found)
            for run in operators(problem(shape, masked, batch, torch.bfloat16, where), "triton").values():
                run()
            for kind in tuner.found.keys() - known:
                if isinstance(kind, tuned.Kind):
                    yield kind, tuner.found[kind]


def said(kind: tuned.Kind, measured: Sequence[tuning.Measured]) -> str:
    """Return in a line what tuning gives a kind of call."""
    entry = entry_of(measured)
    gain = "the default is as good" if entry is None else f"{entry.default_ms / entry.ms:.2f}x, {entry.tile}"
    return f"{kind}: {gain}"


def keep(found: Mapping[Any, Sequence[tuning.Measured]], *paths: Path) -> None:
    """Write the package's table with what this process found to files; what is as good as the default is taken out."""
    known, table = provenance(), tuned.Table.read(tuned.TABLE)
    origin = "; ".join(known[name] for name in ("versions", "commit", "command", "date"))
    run = {"card": known["device"], "from": origin}
    for kind, measured in found.items():
        if not isinstance(kind, tuned.Kind):
            continue
        if (entry := entry_of(measured)) is None:
            table.remove(kind)
        else:
            table.add(run, kind, entry)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write(path)


def keep_all(folder: Path) -> None:
    """Write what this process has found so far to ``folder/tuned.json``."""
    with tuning.tune() as tuner:
        keep(tuner.found, folder / NAME)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the copy; default benchmarks/results/<device>")
    parser.add_argument("--minutes", type=float, default=9.0, help="measure for so long (default: 9)")
    parser.add_argument("--copy-only", action="store_true", help="leave the table of the package as it is")
    options = parser.parse_args(argv)
    if not has_gpu():
        sys.stderr.write("python -m benchmarks.gpu.tune needs a CUDA device: a table of guesses helps nobody\n")
        return 2
    paths = [(options.out or RESULTS / folder_name()) / NAME, *([] if options.copy_only else [tuned.TABLE])]
    found: dict[tuned.Kind, Sequence[tuning.Measured]] = {}
    with aside():
        for kind, measured in measure(60 * options.minutes, device().type):
            sys.stdout.write(said(kind, measured) + "\n")
            sys.stdout.flush()
            found[kind] = measured
            keep(found, *paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
