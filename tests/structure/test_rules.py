"""What the project promises about its own shape: direction of imports, no circles, sizes, names."""

import pytest

from .rules import RULES


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule):
    assert RULES[rule]() == [], RULES[rule].__doc__
