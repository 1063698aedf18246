"""What the tests of the kernels share: no choice of an engine is remembered from one test to the next."""

from collections.abc import Iterator

import pytest

from patchsparse.eager import forget


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()
