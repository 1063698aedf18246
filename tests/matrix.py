"""Tables of test cases: each pair of values runs by default, all other combinations are marked ``rest``."""

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Pair = tuple[tuple[int, int], tuple[int, int]]


def _pairs(row: tuple[int, ...]) -> set[Pair]:
    return set(combinations(enumerate(row), 2)) or {((0, row[0]), (0, row[0]))}


def pairwise(*axes: Sequence[Any], allowed: Callable[..., bool] = lambda *_: True) -> list[Any]:
    """Return all combinations of values, one from each axis, for ``parametrize``.

    Every pair of values of two axes stands in a case that runs by default; the other cases are marked ``rest``.
    Combinations that are not ``allowed`` are left out; their pairs then run by default in other cases.
    """
    rows = [row for row in product(*(range(len(axis)) for axis in axes)) if allowed(*_values(axes, row))]
    missing = set().union(*map(_pairs, rows))
    default = set()
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs(row)))
        default.add(best)
        missing -= _pairs(best)
    return _marked(axes, rows, default)


def _marked(axes: Sequence[Sequence[Any]], rows: Sequence[tuple[int, ...]], default: set[tuple[int, ...]]) -> list[Any]:
    return [pytest.param(*_values(axes, row), marks=() if row in default else pytest.mark.rest) for row in rows]


def _values(axes: Sequence[Sequence[Any]], row: Sequence[int]) -> list[Any]:
    return [axis[place] for axis, place in zip(axes, row, strict=True)]


def rest_but(default: Sequence[Any], cases: Sequence[Any]) -> list[Any]:
    """Return the cases for ``parametrize``; those that are not among the ``default`` ones are marked ``rest``.

    A tuple is a row of values for several parameters.
    """
    unknown = [case for case in default if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*row, marks=() if case in default else pytest.mark.rest)
        for row, case in zip(rows, cases, strict=True)
    ]


def one_of_each(*axes: Sequence[Any]) -> list[Any]:
    """Return all combinations of values for ``parametrize``; by default run as few as hold every value once.

    This is for matrices of slow cases whose axes are tested in pairs elsewhere; the other cases are marked ``rest``.
    """
    turns = max(len(axis) for axis in axes)
    default = {tuple(turn % len(axis) for axis in axes) for turn in range(turns)}
    return _marked(axes, [*product(*(range(len(axis)) for axis in axes))], default)
