"""Check values of options and compare them: what the commands share."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_args

from spatspark_fast.common.errors import UserError

__all__ = ["check_choice", "check_least", "differences", "from_plain", "groups_of", "need", "to_plain"]

Config = TypeVar("Config")


def need(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raise `UserError` naming the option, its value and the remedy, unless the condition holds."""
    if not condition:
        raise UserError(f"--{option} is {value}: {remedy}")


def check_least(config: object, options: Iterable[str], least: int) -> None:
    """Raise `UserError` for the first of the ``group.name`` options that is given and below ``least``."""
    for option in options:
        group, name = option.split(".")
        value = getattr(getattr(config, group), name)
        fits = value is None or (math.isfinite(value) and value >= least)
        need(fits, option, value, f"give a number of at least {least}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `UserError` naming all ``choices``, a `Literal`, unless ``value`` is one of them."""
    if value not in get_args(choices):
        raise UserError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def groups_of(config: type) -> dict[str, type]:
    """Return the groups of options of a configuration: its fields that are dataclasses, by name."""
    made_by = {field.name: field.default_factory for field in fields(config)}
    return {name: group for name, group in made_by.items() if isinstance(group, type) and is_dataclass(group)}


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration, a dataclass of groups, as nested dicts of plain values."""
    return asdict(config)


def from_plain(config: type[Config], plain: Mapping[str, Any]) -> Config:
    """Build a configuration from nested dicts; what is not given keeps its default.

    Raises `UserError` for an unknown name in a group.
    """
    groups = groups_of(config)
    names = [field.name for field in fields(config)]  # pyright: ignore[reportArgumentType]
    values = {name: plain[name] for name in names if name in plain}
    for name, group in groups.items():
        given = dict(values.get(name) or {})
        known = {field.name for field in fields(group)}
        if unknown := sorted(set(given) - known):
            raise UserError(f"unknown option {name}.{unknown[0]}; known are {', '.join(sorted(known))}")
        values[name] = group(**given)
    return config(**values)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Name the options in groups that both have and that differ, as ``group.name (theirs -> ours)``."""
    found = []
    for group in sorted(set(ours) & set(theirs)):
        a, b = ours.get(group) or {}, theirs.get(group) or {}
        if isinstance(a, dict) and isinstance(b, dict):
            names = sorted(set(a) & set(b))
            found += [f"{group}.{n} ({b.get(n)} -> {a.get(n)})" for n in names if a.get(n) != b.get(n)]
    return found
