"""What every command does with its command line: spelling, exit codes, errors that are one sentence, YAML."""

import contextlib
import os
import re
import signal
import sys
from argparse import Action, ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from spatspark_fast.common.errors import RunStopped, UserError
from spatspark_fast.common.scarce import scarcity
from spatspark_fast.common.signals import is_worker, signals_as, stopping
from spatspark_fast.common.values import MOST_BYTES, check_value, legible, load_options

__all__ = [
    "asked",
    "command_parser",
    "config_first",
    "program",
    "read_yaml",
    "run_command",
    "underscored",
]


def run_command(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command on the words ``argv``, by default those of this process, and return its exit code.

    Options may be spelled with hyphens. `UserError`, mistakes on the command line and a machine without room become
    one sentence on stderr and code 2; a signal that ends the command, 128 plus its number (130 for Ctrl-C, 143 for
    SIGTERM). Any other exception is a defect of ours and keeps its traceback.
    """
    if is_worker():
        _complain("error: " + AGAIN)
        raise SystemExit(2)
    try:
        with signals_as(stopping()):
            code = function(_readable(underscored(sys.argv[1:] if argv is None else argv))) or 0
            sys.stdout.flush()
            return code
    except BaseException as error:
        code, said = _ending(error)
        if code is None:
            raise
        _forget_output()
        if said:
            _complain(said)
        return code


def _ending(error: BaseException) -> tuple[int | None, str]:
    """Return the exit code and the sentence of what ended a command; None for a defect of ours."""
    if isinstance(error, UserError | ArgumentError):
        return 2, f"error: {_sentence(error)}"
    if isinstance(error, RunStopped):
        return 128 + error.signum, _sentence(error) or "stopped"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as `| head` does
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, Exception) and (found := scarcity(error)) is not None:
        return 2, f"error: {found}"
    return None, ""


def _readable(argv: list[str]) -> list[str]:
    """Return the words of a command line; raise `UserError` for one that can name no file."""
    for word in argv:
        try:
            bad = b"\0" in os.fsencode(word)
        except UnicodeEncodeError:
            bad = True
        if bad:
            raise UserError(f"{word[:80]!r} holds what is no text: leave out NUL and lone surrogates")
    return argv


AGAIN = (
    "this program is run once more by a process that it started: call a command below "
    'if __name__ == "__main__", or give --data.num_workers 0'
)


def _forget_output() -> None:
    """Throw away what can no longer be written to standard output, which would fail once more at the end."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def underscored(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line with underscores for the hyphens in the names of options.

    Raises `UserError` for an option whose value is ``--``.
    """
    return [_underscored(word) if word.startswith("--") else word for word in argv]


def _underscored(word: str) -> str:
    name, equals, value = word[2:].partition("=")
    if value == "--":  # argparse would take it for the end of the options, and hand out an empty list
        raise UserError(f"--{name} is '--', which is no value: leave it out")
    return f"--{name.replace('-', '_')}{equals}{value}"


def program(command: str) -> str:
    """Return how a command was started, for the usage line of its ``--help``."""
    started = Path(sys.argv[0])
    if started.stem == "spatspark":
        return f"spatspark {command}"
    if started.name == "__main__.py" and started.parent.name == "spatspark_fast":
        return f"python -m spatspark_fast {command}"
    return f"python -m spatspark_fast.{command}"


class _HelpFormatter(DefaultHelpFormatter):
    """Show types and defaults of options, but neither a type whose values are listed nor a default that is null."""

    def _get_help_string(self, action: Action) -> str:
        words = super()._get_help_string(action)
        if (self._get_type_str(action) or "").startswith("Literal"):
            words = words.replace("type: %(type)s, ", "").replace(" (type: %(type)s)", "")
        if action.default is None:
            words = words.replace(", default: %(default)s", "").replace(" (default: %(default)s)", "")
        return words


class _Parser(ArgumentParser):
    """Refuse values that no option can be, in one sentence."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Return the options; raise `ArgumentError` or `UserError`."""
        try:
            parsed = super().parse_args(*args, **kwargs)
        except (UserError, ArgumentError):
            raise
        except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"the options cannot be read: {error}") from error
        for option, value in parsed.items():
            if option != "config":
                check_value(option, value)
        return parsed


def command_parser(name: str, description: str) -> ArgumentParser:
    """Return the parser of a command, still without options."""
    return _Parser(
        prog=program(name),
        description=description,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        sys.stderr.write(f"spatspark-fast: {legible(text)}\n")
        sys.stderr.flush()


def _sentence(error: BaseException) -> str:
    """Bring a message into one line; say the parser's type errors in words."""
    text = " ".join(str(error.message if isinstance(error, ArgumentError) else error).split())
    text = re.sub(r'Parser key "([\w.]+)"(?: element \d+)?: ', r"--\1: ", text)
    text = re.sub(
        r"Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
        r"Expected a \1. Got value: \2",
        text,
    )
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "value of ")
    text = text.replace(", NoneType", " or null").replace("NoneType", "null")
    return text.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")


def value_of(argv: Sequence[str], option: str) -> str | None:
    """Find ``--option VALUE`` or ``--option=VALUE``; the last one wins."""
    found = None
    for position, word in enumerate(argv):
        if word.startswith(f"--{option}="):
            found = word.split("=", 1)[1]
        elif word == f"--{option}" and position + 1 < len(argv):
            found = argv[position + 1]
    return found


def config_first(argv: Sequence[str]) -> list[str]:
    """Move ``--config FILE`` to the front, so that options win over files wherever they stand."""
    files: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise UserError("--config needs the name of a YAML file")
            files.append(f"--config={value}")
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files + others


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file; raise `UserError` if it cannot be read or holds none."""
    check_value("config", path)
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode()
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    return load_options(text, str(path))


def asked(argv: Sequence[str], option: str) -> str | None:
    """Find an option's value on the command line, else in the config file, before the real parser exists."""
    value: Any = value_of(argv, option)
    file = value_of(argv, "config")
    if value is None and file is not None:
        value = read_yaml(Path(file))
        for name in option.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    return None if value in (None, "null", "") else str(value)
