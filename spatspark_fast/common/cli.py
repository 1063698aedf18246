"""Turn dataclasses into commands: options, presets, YAML, and errors that are one sentence.

Later wins: defaults, then preset, then ``--config FILE``, then options on the command line.
"""

import re
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentParser,
)

from spatspark_fast.common.errors import RunStopped, UserError
from spatspark_fast.pretrain.config import GROUPS, PretrainConfig, from_plain, to_plain, validate

__all__ = [
    "Request",
    "add_run_options",
    "add_start_options",
    "asked",
    "config_first",
    "parse_pretrain",
    "preset_names",
    "preset_path",
    "program",
    "read_yaml",
    "run_command",
]

PRESETS = "spatspark_fast.pretrain.presets"  # of pretrain


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    `UserError` and mistakes on the command line become one sentence on stderr and code 2; a signal becomes
    128 plus its number (130 for Ctrl-C, 143 for SIGTERM). Any other exception is a defect of ours and keeps
    its traceback.
    """
    try:
        return function() or 0
    except (UserError, ArgumentError) as error:
        _complain(f"error: {_sentence(error)}")
        return 2
    except RunStopped as stop:
        _complain(_sentence(stop) or "stopped")
        return 128 + stop.signum
    except KeyboardInterrupt:
        _complain("interrupted")
        return 128 + signal.SIGINT


def program(command: str) -> str:
    """Return how a command was started, for the usage line of its ``--help``."""
    started = Path(sys.argv[0])
    if started.stem == "spatspark":
        return f"spatspark {command}"
    if started.name == "__main__.py" and started.parent.name == "spatspark_fast":
        return f"python -m spatspark_fast {command}"
    return f"python -m spatspark_fast.{command}"


def _complain(text: str) -> None:
    sys.stderr.write(f"spatspark-fast: {text}\n")


def _sentence(error: BaseException) -> str:
    """Bring a message into one line; say the parser's type errors in words."""
    text = " ".join(str(error.message if isinstance(error, ArgumentError) else error).split())
    text = re.sub(r'Parser key "([\w.]+)": ', r"--\1: ", text)
    text = re.sub(
        r"Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
        r"Expected a \1. Got value: \2",
        text,
    )
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "value of ")
    text = text.replace(", NoneType", " or null").replace("NoneType", "null")
    return text.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")


def preset_names(package: str = PRESETS) -> list[str]:
    """Return the names of the presets of a command, which lie in a package of their own."""
    folder = resources.files(package)
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def preset_path(name: str, package: str = PRESETS) -> Path:
    """Return the YAML file of a preset; raise `UserError` for an unknown name."""
    if name not in preset_names(package):
        raise UserError(f"unknown preset {name!r}; there are {', '.join(preset_names(package))}")
    return Path(str(resources.files(package) / f"{name}.yaml"))


@dataclass
class Request:
    """Hold what the command line asks of `pretrain`: options, and what is no option of the training itself.

    ``resume`` is None, "auto" or the path of a checkpoint; ``out`` is None where the command shall choose a
    folder.
    """

    config: PretrainConfig
    preset: str
    out: str | None
    resume: str | None


def _parser(preset: Path | None, prog: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Pretrain a radar encoder by masked image modelling on packed, sparse convolutions. "
        "Without options: the preset `demo` on built-in synthetic radar, under two minutes on two CPU cores.",
        exit_on_error=False,
        default_config_files=[] if preset is None else [str(preset)],
    )
    add_start_options(parser, PRESETS)
    add_run_options(parser, "runs/PRESET-DATE-TIME", GROUPS)
    return parser


def add_start_options(parser: ArgumentParser, presets: str) -> None:
    """Add ``--config`` and ``--preset``; ``presets`` is the package that holds them."""
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with options; wins over the preset")
    parser.add_argument(
        "--preset",
        help=f"options to start from: {', '.join(preset_names(presets))} "
        "(default: demo without --data.path, nl50-resnet18 with it)",
    )


def add_run_options(parser: ArgumentParser, default_out: str, groups: Mapping[str, type]) -> None:
    """Add ``--out``, ``--resume`` and the groups of options of a command that trains."""
    parser.add_argument("--out", help=f"run directory, new or empty (default: {default_out})")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help='go on from a checkpoint: "auto" (or no value) takes the last one in --out, if there is one',
    )
    for name, group in groups.items():
        parser.add_class_arguments(group, name)


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
    for file in files:
        read_yaml(Path(file.split("=", 1)[1]))
    return files + others


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file; raise `UserError` if it cannot be read or holds none."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options; expected groups such as 'data:' with values below them")
    return content


def asked(argv: Sequence[str], option: str) -> str | None:
    """Find an option's value on the command line, else in the config file, before the real parser exists."""
    value: Any = value_of(argv, option)
    file = value_of(argv, "config")
    if value is None and file is not None:
        value = read_yaml(Path(file))
        for name in option.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    return None if value in (None, "null", "") else str(value)


def parse_pretrain(argv: Sequence[str], base: dict[str, Any] | None = None, prog: str = "pretrain") -> Request:
    """Read the command line of `pretrain`.

    ``base`` (nested dicts) takes the place of the preset unless one is asked for: a resumed run starts from
    its own options. Raises `UserError` or `argparse.ArgumentError`.
    """
    argv = list(argv)
    chosen = asked(argv, "preset")
    preset = chosen or ("nl50-resnet18" if asked(argv, "data.path") else "demo")
    use_preset = chosen is not None or base is None
    parser = _parser(preset_path(preset) if use_preset else None, prog)
    if base is not None:
        parser.set_defaults({f"{g}.{n}": v for g, values in base.items() for n, v in values.items()})
    parsed = parser.parse_args(config_first(argv))
    config = from_plain({name: dict(vars(parsed[name])) for name in GROUPS})
    validate(config)
    return Request(config=from_plain(to_plain(config)), preset=preset, out=parsed.out, resume=parsed.resume)
