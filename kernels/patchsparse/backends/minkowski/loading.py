"""Import MinkowskiEngine when it is first asked for, and say in one sentence how to get it where that fails."""

from __future__ import annotations

import collections
import collections.abc
import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

__all__ = ["HOW", "Library", "library", "module"]

HOW = "`python scripts/install_minkowski.py` of this package's repository builds and installs it in a few minutes"


class Library(NamedTuple):
    """MinkowskiEngine, or why there is none.

    Attributes:
        module: the imported package, None if it is missing.
        backend: its compiled part.
        problem: why it is missing, and the remedy; None if imported.
        cuda: whether it was built for CUDA.
    """

    module: Any
    backend: Any
    problem: str | None
    cuda: bool = False


@cache
def library() -> Library:
    """Import MinkowskiEngine on first use; the result says why if that fails."""
    if find_spec("MinkowskiEngine") is None:
        return Library(None, None, f"MinkowskiEngine is not installed; {HOW}")
    try:
        imported = _import()
        backend = import_module("MinkowskiEngineBackend._C")
    except Exception as error:  # a build for another torch fails in the loader, and with anything
        told = str(error).partition("\n")[0]
        return Library(None, None, f"MinkowskiEngine cannot be imported ({type(error).__name__}: {told}); {HOW}")
    return Library(imported, backend, None, bool(imported.is_cuda_available()))


def _import() -> Any:
    """Import the package as if Python were 3.9, and undo what it does to the process on the way."""
    threads = os.environ.get("OMP_NUM_THREADS")
    lent = not hasattr(collections, "Sequence")  # gone since Python 3.10
    if lent:
        collections.__dict__["Sequence"] = collections.abc.Sequence
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of having no CUDA, and of many cores
            return import_module("MinkowskiEngine")
    finally:
        if lent:
            del collections.__dict__["Sequence"]
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)  # set to 16 for all children where there are more cores


def module() -> Any:
    """Return the imported package; raise RuntimeError with the reason if there is none."""
    loaded = library()
    if loaded.module is None:
        raise RuntimeError(loaded.problem)
    return loaded.module
