"""Kill commands at random times and let them go on: ``python -m tests.fuzz.kills --kills 100``.

After each kill no file may be torn; the command that goes on must end with 0, leave what the uninterrupted one leaves,
bit by bit, and nothing besides. Kill N is drawn from the number N alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from .kill_cases import CASES, Case, content, prepare_inputs, rests

__all__ = ["Kills", "main"]

HEAVY = ("torchvision", "torch.onnx", "onnxscript", "xarray", "matplotlib.pyplot", "torchmetrics", "netCDF4")
LONGEST = 300.0  # seconds that a command may take


class Kills:
    """Kill commands in ``place``, and count what becomes of them."""

    def __init__(self, place: Path, cases: Sequence[Case], signum: int = signal.SIGKILL) -> None:
        self.place = place
        self.cases = cases
        self.signum = signum
        self.whole: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        prepare_inputs(place)
        for case in cases:
            case.main()
            begun = time.monotonic()
            out = self._out(case, "whole")
            code, said = self._finish(self._start(case, out), out)
            if code:
                raise RuntimeError(f"{case.command} ends with {code} without any kill: {said}")
            self.seconds[case.command] = time.monotonic() - begun
            self.whole[case.command] = content(out)

    def kill(self, number: int) -> None:
        """Kill one command at a random time, or twice; see that it goes on and ends as if nothing had been."""
        random = Random(number)
        case = random.choices(self.cases, [case.share for case in self.cases])[0]
        out, name = self._out(case, str(number)), case.command
        for turn in range(random.choice((1, 1, 2))):
            process = self._start(case, out, going_on=turn > 0)
            time.sleep(random.uniform(0, self.seconds[name]))
            self._send(process, random.random() < 0.5)
            code, said = self._finish(process, out)
            if code == 0:
                self.counts[name, "ended before"] += 1
                break
            self.counts[name, "killed"] += 1
            self._judge(number, name, said, code, out)
        code, said = self._finish(self._start(case, out, going_on=True), out)
        left = [path.name for path in rests(out) if path.suffix != ".tmp" or not name.endswith("export")]
        if code:
            self._failed(number, name, f"does not go on ({code}): {said}")
        elif not equal(content(out), self.whole[name]):
            self._failed(number, name, f"differs in {different(content(out), self.whole[name])}")
        elif left:
            self._failed(number, name, f"leaves {left}")
        else:
            self.counts[name, "completed, equal"] += 1

    def _judge(self, number: int, name: str, said: str, code: int, out: Path) -> None:
        """Look for torn files; after a signal that can be answered also at the answer."""
        try:
            content(out)
        except Exception as error:
            self._failed(number, name, f"tears a file: {error!r}")
        if self.signum == signal.SIGKILL:
            return
        lines = [line for line in said.splitlines() if "spatspark-fast" in line]
        if code not in (128 + self.signum, -self.signum) or "Traceback" in said or len(lines) > 1:
            self._failed(number, name, f"answers {signal.Signals(self.signum).name} by {code}: {said}")
        if rests(out):
            self._failed(number, name, f"leaves {[path.name for path in rests(out)]} after a signal")

    def _failed(self, number: int, name: str, what: str) -> None:
        self.counts[name, "FAILED"] += 1
        self.failures.append(f"{number} {name}: {what}")

    def _out(self, case: Case, name: str) -> Path:
        folder = self.place / case.command / name
        folder.mkdir(parents=True)
        return folder / "run"

    def _start(self, case: Case, out: Path, going_on: bool = False) -> int:
        """Fork a process that runs the command, which is quicker than to start one; return its id."""
        words = case.words(self.place, out) + (list(case.again) if going_on else [])
        process = os.fork()
        if process == 0:
            code = 70
            try:
                os.setsid()
                said = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(said, 1)
                os.dup2(said, 2)
                torch.manual_seed(0)
                code = case.main()(words)
            finally:
                os._exit(code)
        return process

    def _send(self, process: int, group: bool) -> None:
        """Send the signal to a process, or to all that it started too."""
        try:
            (os.killpg if group else os.kill)(process, self.signum)
        except ProcessLookupError:
            os.kill(process, self.signum)  # it has not begun to lead a group yet

    def _finish(self, process: int, out: Path) -> tuple[int, str]:
        """Wait for a process; return its exit code, negative for a signal, and what it said last."""
        deadline = time.monotonic() + LONGEST
        while (found := os.waitpid(process, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return 124, "hangs"
            time.sleep(0.002)
        log = out.with_suffix(".log")
        return os.waitstatus_to_exitcode(found[1]), log.read_text()[-2000:] if log.exists() else ""


def equal(a: Any, b: Any) -> bool:
    """Compare nested containers, arrays and tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the names of files that differ or are missing."""
    return [name for name in sorted({*a, *b}) if name not in a or name not in b or not equal(a[name], b[name])]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if anything was lost, torn, stuck or another."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--signal", default="KILL", help="KILL, or TERM, INT, HUP, which commands answer")
    parser.add_argument("--commands", nargs="*", help="the commands to kill (default: all)")
    options = parser.parse_args(argv)
    for name in HEAVY:
        import_module(name)
    cases = [case for case in CASES if not options.commands or case.command in options.commands]
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        kills = Kills(Path(place), cases, getattr(signal, f"SIG{options.signal}"))
        number = options.seed
        while sum(count for (_, what), count in kills.counts.items() if what == "killed") < options.kills:
            kills.kill(number)
            sys.stderr.write(f"{number} {kills.failures[-1] if kills.failures else ''}\n")
            number += 1
    names = ("killed", "ended before", "completed, equal", "FAILED")
    sys.stdout.write(f"| command | {' | '.join(names)} |\n|---|{'---:|' * len(names)}\n")
    for case in cases:
        sys.stdout.write(f"| {case.command} | {' | '.join(str(kills.counts[case.command, n]) for n in names)} |\n")
    sys.stdout.write("".join(f"{failure}\n" for failure in kills.failures))
    return 1 if kills.failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
