"""What can become of an input, and how that is told: by exit code and words of a command, or by what a call raises."""

from __future__ import annotations

import contextlib
import io
import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType

import patchsparse
import spatspark_fast

__all__ = ["BAD", "OUTCOMES", "REFUSED", "RIGHT", "Suite", "Verdict", "judge_call", "judge_command", "wrong"]

OUTCOMES = {
    "right": "the number of a reference, or a command that ends well",
    "refused": "one sentence of ours",
    "traceback": "an exception that is no sentence of ours, or other words than one sentence",
    "wrong": "a number that a checksum or a bound could have caught",
    "crash": "the process died",
    "hang": "no answer within the limit",
    "memory": "memory grew beyond the limit",
}
BAD = tuple(OUTCOMES)[2:]
OURS = tuple(str(Path(package.__file__ or "").parent) for package in (spatspark_fast, patchsparse))


@dataclass(frozen=True)
class Verdict:
    """Say what became of an input, and what tells that failure from others."""

    outcome: str
    what: str = ""


RIGHT, REFUSED = Verdict("right"), Verdict("refused")


@dataclass(frozen=True)
class Suite:
    """Hold what one kind of input needs.

    ``prepare(folder)`` writes once what the inputs are made of; ``attempt(random, folder, scratch)`` draws an input,
    tries it in an empty folder of its own, and says what became of it.
    """

    prepare: Callable[[Path], None]
    attempt: Callable[[Random, Path, Path], Verdict]


def wrong(what: str) -> Verdict:
    """Return the verdict on an answer that is not the right one."""
    return Verdict("wrong", what)


def judge_call(function: Callable[[], Verdict | None]) -> Verdict:
    """Call a function of the library, which checks its own result: None is right.

    Memory that a call asks for and does not get is refused by Python, with its size; a command has to say so itself.
    """
    try:
        return function() or RIGHT
    except MemoryError:
        return REFUSED
    except Exception as error:  # the verdict says which
        return REFUSED if is_ours(error) else _traceback(error)


def judge_command(
    main: Callable[[list[str]], int], argv: list[str], check: Callable[[], Verdict | None] | None = None
) -> Verdict:
    """Run a command in this process; ``check`` looks at what it has written when it ends well."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main(argv)
    except SystemExit as stop:  # --help
        code = stop.code or 0
    except BaseException as error:  # the verdict says which
        return _traceback(error)
    if code == 0:
        return (check() if check else None) or RIGHT
    sentences = [line for line in said.getvalue().splitlines() if line.strip()]
    if code == 2 and sentences and sentences[-1].startswith("spatspark-fast: error: ") and len(sentences) <= 2:
        return REFUSED
    return Verdict("traceback", f"exit code {code}, saying {' | '.join(sentences)[:200]!r}")


def is_ours(error: BaseException) -> bool:
    """Tell whether an exception is a sentence of ours: of a kind that we document, from a `raise` in our code."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not isinstance(error, ValueError | TypeError | RuntimeError) or not frames:
        return False
    frame, number = frames[-1]
    file = frame.f_code.co_filename
    return file.startswith(OURS) and linecache.getline(file, number).strip().startswith("raise ")


def _traceback(error: BaseException) -> Verdict:
    return Verdict("traceback", f"{type(error).__name__} {_place(error.__traceback__)}: {_short(error)}")


def _place(trace: TracebackType | None) -> str:
    """Return the last line of ours that an exception went through."""
    ours = [f for f in traceback.extract_tb(trace) if f.filename.startswith(OURS)]
    if not ours:
        return "outside our code"
    root = next(folder for folder in OURS if ours[-1].filename.startswith(folder))
    return f"at {Path(ours[-1].filename).relative_to(Path(root).parent)}:{ours[-1].lineno}"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
