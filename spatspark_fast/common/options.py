"""Check values of options and compare them: what the commands share."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

from spatspark_fast.common.errors import UserError

__all__ = ["check_choice", "check_least", "differences", "group_from_plain", "need"]


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


def group_from_plain(name: str, group: type, plain: Any) -> Any:
    """Build a group of options, a dataclass, from a dict of plain values; unknown names raise `UserError`."""
    values = dict(plain or {})
    known = {field.name for field in fields(group)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown option {name}.{unknown[0]}; known are {', '.join(sorted(known))}")
    return group(**values)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Name the options that differ, as ``group.name (theirs -> ours)``; what is no group of options counts not."""
    found = []
    for group in sorted(set(ours) | set(theirs)):
        a, b = ours.get(group) or {}, theirs.get(group) or {}
        if isinstance(a, dict) and isinstance(b, dict):
            names = sorted(set(a) | set(b))
            found += [f"{group}.{n} ({b.get(n)} -> {a.get(n)})" for n in names if a.get(n) != b.get(n)]
    return found
