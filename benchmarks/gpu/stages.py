"""All that a GPU can build, check and measure, in calls of ten minutes: ``python -m benchmarks gpu``.

Stages run one after the other, each in a process of its own. A stage is not begun when the time is up, and is stopped
when it runs out; what is left is printed as the next command. Results of several calls fill the same tables. Where the
kernels turn out to be wrong the call ends.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..measure.machine import RESULTS, folder_name

__all__ = ["STAGES", "Stage", "gpu"]

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "peers"  # where wheels of other libraries are installed, and nothing else is touched
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Stage:
    """A process to run: arguments of Python, in which {out}, {scale} and {minutes} are filled in.

    Attributes:
        essential: whether its failure ends the call.
    """

    arguments: tuple[str, ...]
    essential: bool = False


def _suite(*files: str) -> Stage:
    paths = [f"benchmarks/{name}" for name in files]
    return Stage((*PYTEST, *paths, "--scale", "{scale}", "--results", "{out}"))


def _layers(*groups: str) -> Stage:
    options = ("--no-check", "--out", "{out}", "--minutes", "{minutes}")
    return Stage(("-m", "benchmarks.gpu.kernels", *options, "--only", *groups))


STAGES: Mapping[str, Stage] = {
    "engine": Stage(("setup.py", "-q", "build_ext", "--inplace")),
    "peers": Stage(("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE))),
    "minkowski": Stage(("scripts/install_minkowski.py",)),
    "kernels-right": Stage(("-m", "benchmarks.gpu.kernels", "--check-only"), essential=True),
    "peers-right": Stage((*PYTEST, "-o", "addopts=", "tests/benchmarks/test_peers.py", "-k", "installed")),
    "layers": _layers("3x3"),
    "step": _suite("test_step.py"),
    "encoder": _suite("test_encoder.py", "test_mask_sweep.py"),
    "memory": _suite("test_memory.py", "test_data.py"),
    "small": _suite("test_pool.py", "test_norm.py"),
    "more-layers": _layers("stride2", "depthwise", "stem", "densify"),
}


def _why_not(name: str, wheels: Path | None) -> str | None:
    """Return why a stage has nothing to do here, or None."""
    if name == "peers" and (wheels is None or not any(wheels.glob("*.whl"))):
        return "no --wheels were given: peers that are installed are used"
    scripts = [a for a in STAGES[name].arguments if a.endswith(".py")]
    missing = [a for a in scripts if not (ROOT / a).exists()]
    return f"{missing[0]} is not there" if missing else None


def command_of(name: str, options: argparse.Namespace, out: Path, minutes: float) -> list[str]:
    """Return the command line of a stage."""
    filled = {"{out}": str(out), "{scale}": options.scale, "{minutes}": f"{max(minutes - 0.5, 0.1):.1f}"}
    arguments = [filled.get(argument, argument) for argument in STAGES[name].arguments]
    if name == "peers":
        arguments += [str(wheel) for wheel in sorted(options.wheels.glob("*.whl"))]
    return [sys.executable, *arguments]


def gpu(options: argparse.Namespace) -> int:
    """Run the stages that are asked for until the time is up; return the exit status.

    Without a GPU only ``--scale tiny`` runs: a rehearsal of the suites.
    """
    if not torch.cuda.is_available() and options.scale != "tiny":
        sys.stderr.write("python -m benchmarks gpu needs a CUDA device; on a CPU run pytest benchmarks/\n")
        return 2
    unknown = sorted(set(options.stages or ()) - set(STAGES))
    if unknown:
        sys.stderr.write(f"no stage is called {', '.join(unknown)}; choose from {', '.join(STAGES)}\n")
        return 2
    began, out = time.monotonic(), options.out or RESULTS / folder_name()
    waiting = list(options.stages or STAGES)
    failed = []
    while waiting:
        left = options.minutes - (time.monotonic() - began) / 60
        if left <= 0:
            break
        name = waiting.pop(0)
        if reason := _why_not(name, options.wheels):
            sys.stdout.write(f"--- {name}: left out, {reason}\n")
        elif not _run(name, command_of(name, options, out.absolute(), left), left):
            failed.append(name)
            if STAGES[name].essential:
                sys.stderr.write(f"{name} failed: nothing is measured\n")
                return 1
    if waiting:
        sys.stdout.write(f"left for the next call: python -m benchmarks gpu --stages {' '.join(waiting)}\n")
    if failed:
        sys.stdout.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


def _run(name: str, command: list[str], minutes: float) -> bool:
    """Run a stage with what is left of the time; return whether it ended well."""
    sys.stdout.write(f"--- {name}: {shlex.join(command)}\n")
    sys.stdout.flush()
    paths = [str(ROOT), str(ROOT / "kernels"), str(SITE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=60 * minutes, check=False).returncode
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"--- {name}: stopped after {minutes:.1f} minutes; its finished parts are kept\n")
        return False
    sys.stdout.write(
        f"--- {name}: {'done' if status == 0 else f'exit code {status}'}, {time.monotonic() - started:.0f} s\n"
    )
    return status == 0
