"""The engines, one module each, and the choice among them."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

from ..geometry import Call

__all__ = ["BOTH_GRADIENTS_AT_ONCE", "ENGINES", "OVERRIDE", "choose", "engine", "order", "requested", "why_not"]

ENGINES = ("triton", "cpp", "gather", "minkowski", "dense")
BOTH_GRADIENTS_AT_ONCE = ("minkowski",)
OVERRIDE = "PATCHSPARSE_BACKEND"


@cache
def engine(name: str) -> ModuleType:
    """Return the module of an engine; raise ValueError for a name that is not one."""
    if name not in ENGINES:
        raise ValueError(f"backend {name!r} is unknown; choose one of auto, {', '.join(ENGINES)}")
    return import_module(f"{__name__}.{name}")


def why_not(name: str, call: Call) -> str | None:
    """Return why an engine cannot take a call, or None if it can."""
    return engine(name).why_not(call)


def order(call: Call) -> tuple[str, ...]:
    """Return the engines that ``"auto"`` tries for a call, best first, by measurement (``benchmarks/``)."""
    if call.device == "cuda":
        return "triton", "gather"
    return ("cpp", "gather") if engine("cpp").pays(call) else ("gather",)


def requested(backend: str) -> str:
    """Return the backend that is asked for: ``PATCHSPARSE_BACKEND`` replaces ``"auto"``."""
    return os.environ.get(OVERRIDE) or "auto" if backend == "auto" else backend


def choose(call: Call, backend: str) -> str:
    """Return the name of the engine that takes a call.

    Args:
        call: what is asked for.
        backend: ``"auto"`` or a name. The environment variable ``PATCHSPARSE_BACKEND`` replaces ``"auto"``.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the named engine cannot take the call, with its reason.
    """
    backend = requested(backend)
    if backend != "auto":
        reason = why_not(backend, call)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {call.operation}: {reason}")
        return backend
    return next(name for name in order(call) if why_not(name, call) is None)
