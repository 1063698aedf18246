"""The command line of a training: what its options mean, and which of them wins.

Later wins: defaults, preset, what the weights to start from demand, ``--config FILE``, options on the command line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentParser,
    Namespace,
)

from spatspark_fast.common.cli import asked, command_parser, config_first, read_yaml
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import from_plain, groups_of, to_plain
from spatspark_fast.training.options import under_new_names

__all__ = ["Request", "TrainingCommand", "parse_training", "preset_names", "training_parser"]

Config = TypeVar("Config")

PRESET_WITHOUT_DATA = "demo"
PRESET_WITH_DATA = "nl50-resnet18"


@dataclass(frozen=True)
class TrainingCommand(Generic[Config]):
    """Say what tells one training command from another.

    Args:
        name: name of the command
        description: what ``--help`` says first
        config: dataclass of all options
        validate: checks a configuration and raises `UserError`
        presets: package with the YAML files of the presets
        fixed: beginnings of options that cannot change when a run goes on
        foreign: what to do with a checkpoint of another command
        free: beginnings of fixed options that can change all the same
        prefix: what the names of default run directories begin with
        own: adds options that lie in no group, with their help
    """

    name: str
    description: str
    config: type[Config]
    validate: Callable[[Config], None]
    presets: str
    fixed: tuple[str, ...]
    foreign: str
    free: tuple[str, ...] = ()
    prefix: str = ""
    own: Callable[[ArgumentParser], None] | None = None


@dataclass
class Request(Generic[Config]):
    """Hold what a command line asks for: options, and what is no option of the training itself.

    ``resume`` is None, "auto" or the path of a checkpoint; ``out`` is None where the command chooses a folder.
    """

    config: Config
    preset: str
    out: str | None
    resume: str | None


def preset_names(package: str) -> list[str]:
    """Return the names of the presets of a command, which lie in a package of their own."""
    folder = resources.files(package)
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def preset_path(name: str, package: str) -> Path:
    """Return the YAML file of a preset; raise `UserError` for an unknown name."""
    if name not in preset_names(package):
        raise UserError(f"unknown preset {name!r}; there are {', '.join(preset_names(package))}")
    return Path(str(resources.files(package) / f"{name}.yaml"))


def parse_training(
    command: TrainingCommand[Config],
    argv: Sequence[str],
    base: Mapping[str, Any] | None = None,
    demands: Mapping[str, Any] | None = None,
) -> Request[Config]:
    """Read the command line of a training.

    ``base`` (nested dicts) takes the place of the preset unless one is asked for: a resumed run starts from its
    own options. ``demands`` maps options such as ``model.encoder`` to values that win over both. Raises `UserError` or
    `argparse.ArgumentError`.
    """
    argv = config_first(argv)
    chosen = asked(argv, "preset")
    preset = chosen or (PRESET_WITH_DATA if asked(argv, "data.path") else PRESET_WITHOUT_DATA)
    if chosen is not None or base is None:
        base = _over(base or {}, read_yaml(preset_path(preset, command.presets)))
    groups = groups_of(command.config)
    start = to_plain(from_plain(command.config, under_new_names(base)))
    parser = training_parser(command)
    parser.set_defaults({**_flat(start, groups), **(demands or {})})
    parsed = parser.parse_args([_under_new_names(word, groups) for word in argv])
    values = {name: _group(name, parsed[name]) if name in groups else parsed[name] for name in start}
    config = from_plain(command.config, values)
    command.validate(config)
    return Request(config, preset, parsed.out, parsed.resume)


def _under_new_names(word: str, groups: Mapping[str, type]) -> str:
    """Return ``--config=FILE`` with what it holds in place of the file, by today's names."""
    option, _, file = word.partition("=")
    if option != "--config":
        return word
    found = under_new_names(read_yaml(Path(file)))
    for name in groups:
        _group(name, found.get(name, {}))
    return f"--config={yaml.safe_dump(found)}"


def _group(name: str, values: Any) -> dict[str, Any]:
    """Return the options of a group; raise `UserError` if something else stands there."""
    if not isinstance(values, Mapping | Namespace):
        raise UserError(f"--{name} is {values}: it is a group, whose options have names such as --{name}.NAME")
    return dict(vars(values)) if isinstance(values, Namespace) else dict(values)


def _over(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested dicts over others."""
    grouped = {name: {**(base.get(name) or {}), **values} for name, values in layer.items() if isinstance(values, dict)}
    return {**base, **layer, **grouped}


def _flat(plain: Mapping[str, Any], groups: Mapping[str, type]) -> dict[str, Any]:
    """Return options by their names on the command line."""
    flat = {name: value for name, value in plain.items() if name not in groups}
    return flat | {f"{group}.{name}": value for group in groups for name, value in plain[group].items()}


def training_parser(command: TrainingCommand[Any]) -> ArgumentParser:
    """Return the parser of a training command, with the defaults of its dataclasses."""
    names = ", ".join(preset_names(command.presets))
    parser = command_parser(command.name, f"{command.description} Defaults below are those of the preset.")
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with options; wins over the preset")
    rule = f"{PRESET_WITHOUT_DATA} without --data.path, {PRESET_WITH_DATA} with it"
    add("--preset", help=f"options to start from: {names} (default: {rule})")
    if command.own is not None:
        command.own(parser)
    add("--out", help=f"run directory, new or empty (default: runs/{command.prefix}PRESET-DATE-TIME)")
    resume = 'go on from a checkpoint: "auto" (or no value) takes the last one in --out, if there is one'
    add("--resume", nargs="?", const="auto", help=resume)
    for name, group in groups_of(command.config).items():
        parser.add_class_arguments(group, name)
    return parser
