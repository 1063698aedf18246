"""Check values of options and compare them: what the commands share."""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spatspark_fast.common.errors import UserError

__all__ = [
    "check_choice",
    "check_least",
    "check_most",
    "check_types",
    "differences",
    "from_plain",
    "groups_of",
    "need",
    "notes_on_idle",
    "to_plain",
]

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


def check_most(config: object, most: Mapping[str, float]) -> None:
    """Raise `UserError` for the first of the ``group.name`` options that is above what it can be at ``most``."""
    for option, limit in most.items():
        group, name = option.split(".")
        value = getattr(getattr(config, group), name)
        need(value is None or value <= limit, option, value, f"give a number of at most {limit}")


def notes_on_idle(config: Any, idle: Mapping[str, str]) -> list[str]:
    """Say which ``group.name`` options, ``idle`` for a reason, are other than by default and change nothing."""
    usual, notes = type(config)(), []
    for option, reason in idle.items():
        group, name = option.split(".")
        value = getattr(getattr(config, group), name)
        if value != getattr(getattr(usual, group), name):
            notes.append(f"Note: --{option} {value} changes nothing here: {reason}")
    return notes


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `UserError` naming all ``choices``, a `Literal`, unless ``value`` is one of them."""
    if value not in get_args(choices):
        raise UserError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def check_types(values: object, hints: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Return ``values`` as a dict if it maps names of ``hints`` to values of those types.

    Raises `UserError` for an unknown name, naming the known ones, and for a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"options {group.rstrip('.')} are {reprlib.repr(values)}, no names with values")
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown option {group}{name}; known are {', '.join(sorted(hints))}")
        if not _fits(value, hints[name]):
            words = str(getattr(hints[name], "__name__", hints[name])).replace("typing.", "")
            raise UserError(f"option {group}{name} is {reprlib.repr(value)}, not of the type {words}")
    return dict(values)


def _fits(value: object, hint: Any) -> bool:
    """Tell whether a plain value is of a type: a class, a union, a `Literal`, or a list of such."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def groups_of(config: type) -> dict[str, type]:
    """Return the groups of options of a configuration: its fields that are dataclasses, by name."""
    made_by = {field.name: field.default_factory for field in fields(config)}
    return {name: group for name, group in made_by.items() if isinstance(group, type) and is_dataclass(group)}


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration, a dataclass of groups, as nested dicts of plain values."""
    return asdict(config)


def from_plain(config: type[Config], plain: Mapping[str, Any]) -> Config:
    """Build a configuration from nested dicts; what is not given keeps its default.

    Raises `UserError` for an unknown name, and for a value of another type than that of its option.
    """
    groups, hints = groups_of(config), get_type_hints(config)
    known = check_types(plain, {name: dict | None if name in groups else hint for name, hint in hints.items()})
    values = {name: value for name, value in known.items() if name not in groups}
    for name, group in groups.items():
        values[name] = group(**check_types(known.get(name) or {}, get_type_hints(group), f"{name}."))
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
