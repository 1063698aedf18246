"""The tables of test cases leave no pair out of the default run."""

from itertools import combinations, product

import pytest

from .matrix import one_of_each, pairwise, rest_but


@pytest.mark.parametrize("axes", [("ab", "cd"), ("abc", "de", "fg"), ("ab", "cd", "ef", "ghi")])
def test_every_pair_runs_by_default(axes):
    cases = pairwise(*axes)
    assert [case.values for case in cases] == list(product(*axes))
    default = [case.values for case in cases if not case.marks]
    for one, two in combinations(range(len(axes)), 2):
        assert {(case[one], case[two]) for case in default} == set(product(axes[one], axes[two]))
    assert len(default) == len(cases) if len(axes) == 2 else len(default) < len(cases)


def test_pairs_of_what_is_not_allowed_run_elsewhere():
    cases = pairwise("ab", "cd", "ef", allowed=lambda *values: values != ("a", "c", "e"))
    default = {case.values for case in cases if not case.marks}
    assert ("a", "c", "e") not in {case.values for case in cases}
    assert ("a", "c", "f") in default


def test_all_but_the_named_cases_are_rest():
    first, second = rest_but([(1, "a")], [(1, "a"), (2, "b")])
    assert (first.values, first.marks) == ((1, "a"), ())
    assert (second.values, second.marks[0].name) == ((2, "b"), "rest")
    assert rest_but([1], [1])[0].values == (1,)
    with pytest.raises(AssertionError, match="no such cases"):
        rest_but([3], [1, 2])


def test_every_value_runs_by_default():
    cases = one_of_each("abc", "de")
    assert [case.values for case in cases] == list(product("abc", "de"))
    default = [case.values for case in cases if not case.marks]
    assert default == [("a", "d"), ("b", "e"), ("c", "d")]
