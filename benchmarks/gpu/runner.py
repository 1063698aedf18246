"""Run the lines of a plan as processes with limits: what they print goes on and into logs, what they leave is packed.

A line that runs out of time is interrupted first, so that it can say what it has, and killed a little later. Each
keeps its own rows. The archive is written anew after every line: whoever is killed leaves it behind.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO, Any

from .plan import Line

__all__ = ["GRACE", "Ended", "Runner", "StoppedError", "pack", "signals_raise"]

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "peers"  # where wheels of other libraries are installed, and nothing else is touched
GRACE = 5.0  # seconds from the interrupt to the kill
LEAST = 3.0  # seconds that are worth the start of a line
# A group of its own, so that what a line starts ends with it.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class StoppedError(BaseException):
    """A signal asked this process to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let signals that end a process raise `StoppedError`, so that lines are stopped and results packed."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise StoppedError(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def pack(folder: Path, archive: Path, without: Container[str] = ()) -> None:
    """Write a folder into one ``.tar.gz``; an archive that is there is replaced when the new is whole.

    Args:
        folder: what is packed.
        archive: where to.
        without: suffixes of files that are left out.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    fresh = archive.with_name(archive.name + ".new")
    with tarfile.open(fresh, "w:gz") as file:
        file.add(folder, folder.name, filter=lambda entry: None if Path(entry.name).suffix in without else entry)
    fresh.replace(archive)


@dataclass(frozen=True)
class Ended:
    """How a line ended, and after how many seconds."""

    line: Line
    how: str
    seconds: float = 0.0

    @property
    def well(self) -> bool:
        """Whether it did what it was asked, or had nothing to do."""
        return self.how == "done" or self.how.startswith("left out")


@dataclass
class Runner:
    """Run lines one after the other.

    Attributes:
        out: folder of all that is left, logs in ``out/logs``.
        archive: file that holds it, too.
        python: the interpreter, and what it is always started with.
        filled: what stands for the placeholders of a command; an empty tuple leaves the argument out.
        ended: lines that have ended.
    """

    out: Path
    archive: Path
    python: Sequence[str]
    filled: Mapping[str, Sequence[str]]
    ended: list[Ended] = field(default_factory=list)

    def command(self, line: Line, seconds: float) -> list[str]:
        """Return the command of a line that has so many seconds."""
        minutes = f"{max(seconds - GRACE, 1.0) / 60:.2f}"
        known = {"{python}": self.python, "{python line}": [shlex.join(self.python)], "{out}": [str(self.out)]}
        known |= {"{minutes}": [minutes], "{site}": [str(SITE)], **self.filled}
        return [part for argument in line.command for part in known.get(argument, [argument])]

    def why_not(self, line: Line) -> str | None:
        """Return why a line has nothing to do here, or None."""
        if line.needs == "wheels":
            return None if self.filled["{wheels}"] else "no --wheels were given: what is installed is used"
        return f"{line.needs} is not there" if line.needs and shutil.which(line.needs) is None else None

    def run(self, line: Line, seconds: float) -> Ended:
        """Run a line for at most so many seconds; keep and return how it ended."""
        if reason := self.why_not(line):
            return self._keep(Ended(line, f"left out, {reason}"))
        if seconds < LEAST:
            return self._keep(Ended(line, "not begun, no time was left"))
        command = self.command(line, seconds)
        _say(f"--- {line.name} ({seconds:.0f} s): {shlex.join(command)}")
        log = self.out / "logs" / f"{line.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            how = _watched(command, log, seconds)
        except StoppedError as stopped:
            self._keep(Ended(line, f"stopped by {stopped}", time.monotonic() - started))
            raise
        return self._keep(Ended(line, how, time.monotonic() - started))

    def _keep(self, ended: Ended) -> Ended:
        self.ended.append(ended)
        _say(f"--- {ended.line.name}: {ended.how}, {ended.seconds:.0f} s")
        pack(self.out, self.archive)
        return ended


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(SITE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def _watched(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command, print and log what it prints, and stop it when its time is up; return how it ended."""
    options = {"cwd": ROOT, "env": _environment(), "stdin": subprocess.DEVNULL, **GROUP}
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    except OSError as error:
        return f"could not be started: {error}"
    with log.open("wb") as file:
        reader = Thread(target=_pass_on, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            status = process.wait(seconds)
            how = "done" if status == 0 else f"exit code {status}"
        except subprocess.TimeoutExpired:
            _stop(process)
            how = f"stopped after {seconds:.0f} s; its rows are kept"
        except StoppedError:
            _stop(process)
            raise
        finally:
            _signal(process, signal.SIGKILL)  # what it left running holds the pipe open
            reader.join(GRACE)
    return how


def _stop(process: subprocess.Popen[Any]) -> None:
    """Interrupt a process and all that it started; kill what is left after the grace."""
    _signal(process, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[Any], signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _pass_on(source: IO[bytes], log: IO[bytes]) -> None:
    with source:
        for text in source:
            log.write(text)
            log.flush()
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
