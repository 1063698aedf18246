"""Find and load the compiled engine, a plain C library beside this package, and say which instruction set it uses."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...processor import ISA
from . import native

__all__ = ["HOW", "ISA", "Library", "engine", "load"]

ENGINE = "PATCHSPARSE_ENGINE"
HOW = (
    "reinstall with a C++17 compiler on the PATH (`pip install --force-reinstall --no-deps .`); "
    "the other engines do not need it"
)


class Library(NamedTuple):
    """The loaded library, or why there is none.

    Attributes:
        handle: the ctypes library, None if missing.
        problem: why it is missing, and the remedy; None if loaded.
        isas: names of the instruction sets that this processor and this build can run, least first.
        serial: why only one thread can be used; None if the process has an OpenMP runtime to borrow.
    """

    handle: ctypes.CDLL | None
    problem: str | None
    isas: tuple[str, ...] = ()
    serial: str | None = None

    def isa(self) -> str:
        """Return the name of the instruction set in use: the best, or the one that ``PATCHSPARSE_ISA`` names.

        Raises:
            RuntimeError: if the library is missing, or cannot run the named set here; the message is one sentence.
        """
        if self.problem is not None:
            raise RuntimeError(self.problem)
        wanted = os.environ.get(ISA) or self.isas[-1]
        if wanted not in self.isas:
            raise RuntimeError(f"{ISA}={wanted} cannot run here; choose one of {', '.join(self.isas)}")
        return wanted

    def isa_number(self) -> int:
        """Return its number in ``csrc/engine.h``; raise RuntimeError as :meth:`isa` does."""
        return native.ISAS.index(self.isa())


@cache
def load() -> Library:
    """Load the library on first use; the result says why if that fails.

    The environment variable ``PATCHSPARSE_ENGINE`` names another build, such as one with sanitizers.
    """
    path = Path(os.environ.get(ENGINE) or Path(__file__).parents[2] / "_engine.so")
    if not path.exists():
        return Library(None, f"the C++ engine was not built ({path.name} is missing); {HOW}")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, f"{path.name} cannot be loaded ({error}); {HOW}")
    if handle.ps_abi() != native.ABI:
        return Library(None, f"{path.name} has interface {handle.ps_abi()}, this version needs {native.ABI}; {HOW}")
    native.declare(handle)
    isas = tuple(name for number, name in enumerate(native.ISAS) if handle.ps_isa_supported(number))
    return Library(handle, None, isas, _borrow_threads(handle))


def engine() -> ctypes.CDLL:
    """Return the loaded library; raise RuntimeError, with the remedy, if it is missing."""
    loaded = load()
    if loaded.handle is None:
        raise RuntimeError(loaded.problem)
    return loaded.handle


def _borrow_threads(handle: ctypes.CDLL) -> str | None:
    """Hand the engine the OpenMP runtime that torch has loaded, so that there is one pool of threads, not two."""
    try:
        process = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = [ctypes.cast(getattr(process, name), c_void_p) for name in names]
    except (AttributeError, OSError, TypeError) as error:
        return f"no OpenMP runtime in the process to borrow threads from ({error}); one thread is used"
    handle.ps_set_runtime(*found)
    return None
