"""Import parts of pysteps, the oracle of the scores; skip the test, saying so, without it."""

import contextlib
import importlib
import io
import warnings
from typing import Any

import pytest


def pysteps_module(name: str) -> Any:
    """Return a module of pysteps, which talks on import and warns in ways that are its own business."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f'{name} cannot be imported ({error}): pip install "spatspark-fast[radar]"')
