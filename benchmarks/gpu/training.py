"""The main job itself on a GPU: pretraining in float32 and bfloat16, killed and resumed, beside dense-and-mask.

``python -m benchmarks.gpu.training`` runs ``python -m spatspark_fast.pretrain`` with the preset ``demo`` for 20 steps,
each run in a process of its own, all at the same time: losses are compared here, not times. A killed run is killed hard
in its second epoch and goes on from the checkpoint of the first.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from ..measure.machine import kept_in, provenance

__all__ = ["RUNS", "Run", "main", "report"]

STEPS = 20
KILLED_AFTER = 11  # steps; an epoch of the preset has 8
PATIENCE = 300.0  # seconds until a run that logs nothing is given up
QUIET = {"trainer.log_every": "1", "trainer.savings": "false", "trainer.tensorboard": "false"}


@dataclass(frozen=True)
class Run:
    """One training: its options, and whether it is killed on the way."""

    options: Mapping[str, str]
    killed: bool = False


RUNS = {
    "float32": Run({"trainer.precision": "fp32"}),
    "float32, killed and resumed": Run({"trainer.precision": "fp32"}, True),
    "bfloat16": Run({"trainer.precision": "bf16"}),
    "bfloat16, killed and resumed": Run({"trainer.precision": "bf16"}, True),
    "float32, dense-and-mask": Run({"trainer.precision": "fp32", "model.backend": "dense"}),
}
# What is compared: a run, the one that it should equal, and by how much a loss may differ relatively. A GPU sums in no
# fixed order in cuDNN's weight gradients, and rounding of 20 steps adds up.
PAIRS = (
    ("float32, killed and resumed", "float32", 0.02),
    ("bfloat16, killed and resumed", "bfloat16", 0.02),
    ("float32, dense-and-mask", "float32", 0.02),
    ("bfloat16", "float32", 0.1),
)


def losses(out: Path) -> list[float]:
    """Return the losses of a run directory, step by step; whole lines only."""
    path = out / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    return [float(row["loss"]) for row in rows if row["loss"]]


def train(python: Sequence[str], run: Run, out: Path, more: Mapping[str, str]) -> list[float]:
    """Run one training, and on after a kill; return its losses.

    Raises:
        RuntimeError: if it ends otherwise than it should, with the end of what it printed.
    """
    options = {"preset": "demo", "trainer.max_steps": str(STEPS), **QUIET, **run.options, **more, "out": str(out)}
    command = [*python, "-m", "spatspark_fast.pretrain", *(f"--{name}={value}" for name, value in options.items())]
    if run.killed:
        _until_killed(command, out)
        command += ["--resume"]
    log = out.with_suffix(".log")
    with log.open("a") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), check=False
        ).returncode
    if status != 0:
        raise RuntimeError(f"exit code {status}: {' '.join(log.read_text().split())[-400:]}")
    return losses(out)


def _environment() -> dict[str, str]:
    """Return the environment of a run, which shares the processor with all the others."""
    return os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(RUNS)))}


def _until_killed(command: Sequence[str], out: Path) -> None:
    """Start a training and kill it hard after some steps."""
    with out.with_suffix(".log").open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
        since = time.monotonic()
        while process.poll() is None and len(losses(out)) < KILLED_AFTER and time.monotonic() - since < PATIENCE:
            time.sleep(0.02)
        process.kill()
        process.wait()
    if len(losses(out)) < KILLED_AFTER:
        raise RuntimeError(f"it logged {len(losses(out))} steps: {' '.join(_tail(out).split())[-400:]}")


def _tail(out: Path) -> str:
    return out.with_suffix(".log").read_text()[-2000:]


def report(found: Mapping[str, list[float] | str]) -> tuple[str, bool]:
    """Return a table of losses with the largest differences, and whether all runs ended and agree.

    Args:
        found: the losses of each run, or why it has none.
    """
    right, lines = True, []
    for name, values in found.items():
        if isinstance(values, str):
            right = False
            lines.append(f"{name:30} FAILED: {values}")
            continue
        good = len(values) == STEPS and all(map(math.isfinite, values))
        right &= good
        shown = f"{values[0]:.5f} at the first, {values[-1]:.5f} at the last of" if values else "none,"
        lines.append(f"{name:30} loss {shown} {len(values)} steps{'' if good else '  WRONG'}")
    for one, other, limit in PAIRS:
        a, b = found.get(one), found.get(other)
        if isinstance(a, list) and isinstance(b, list) and a and len(a) == len(b):
            difference = max(abs(x - y) / max(abs(y), 1e-30) for x, y in zip(a, b, strict=True))
            good = difference <= limit  # NaN is not
            right &= good
            lines.append(f"{one} over {other}: a loss differs by {difference:.1e} at most{'' if good else '  WRONG'}")
    return "\n".join(lines), right


def graphs(out: Path) -> list[str]:
    """Return what a run said of CUDA graphs: that it captured steps, or why not."""
    log = out.with_suffix(".log")
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.strip() for line in lines if "Captured a training step" in line or "without a CUDA graph" in line]


def _keep(found: Mapping[str, list[float] | str], said: Mapping[str, list[str]], folder: Path | None) -> None:
    """Write the losses of the runs that have ended, and what they said of CUDA graphs, if there is a folder for it."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = {"origin": provenance(), "losses": found, "graphs": said}
    (folder / "pretrain.json").write_text(json.dumps(content, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all trainings, print and keep their losses; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default benchmarks/results/<card>, without a card none"
    )
    parser.add_argument("--python", default=sys.executable, metavar="COMMAND", help="what starts python")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="more options of pretrain")
    options = parser.parse_args(argv)
    if find_spec("jsonargparse") is None:
        sys.stdout.write(
            "left out  pretraining: jsonargparse is not installed; give --wheels with it (make gpu-wheels)\n"
        )
        return 3
    folder = kept_in(options.out)
    more = dict(option.split("=", 1) for option in options.options)
    scratch = Path(tempfile.mkdtemp(prefix="pretrain-"))

    def one(name: str) -> None:
        out, began = scratch / name.replace(", ", "-").replace(" ", "-"), time.monotonic()
        try:
            ended = train(shlex.split(options.python), RUNS[name], out, more)
        except RuntimeError as error:
            ended = str(error)
        with lock:
            found[name], said[name] = ended, graphs(out)
            _keep(found, said, folder)
            sys.stdout.write(f"{name}: ended after {time.monotonic() - began:.0f} s; {' '.join(said[name])}\n")
            sys.stdout.flush()

    found: dict[str, list[float] | str] = {}
    said: dict[str, list[str]] = {}
    lock = Lock()
    try:
        with ThreadPoolExecutor(len(RUNS)) as pool:
            list(pool.map(one, RUNS))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text, right = report({name: found[name] for name in RUNS})
    sys.stdout.write(text + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
