"""What the project promises about its own shape: direction of imports, no circles, sizes, names."""

import pytest

from .pending import PENDING
from .rules import RULES


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule):
    found, pending = set(RULES[rule]()), PENDING.get(rule, set())
    assert not found - pending, RULES[rule].__doc__
    assert not pending - found, "these are mended: take them off the list in pending.py"


def test_only_rules_are_pending():
    assert set(PENDING) <= set(RULES)
