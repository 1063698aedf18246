"""Calls that only compute, apart from those that something records or transforms; and what is worked out once for them.

An eager call of plain tensors may skip all that a registered operator brings with it, which costs the host more time
than a small kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["PLAIN", "forget", "is_traced", "is_transformed", "known", "once"]

T = TypeVar("T")
PLAIN = (Tensor, nn.Parameter)  # types of tensors that are no subclasses
_memos: list[Callable[[], None]] = []  # what empties the memo of each function of `known` and `once`


def is_traced() -> bool:
    """Return whether operations are recorded or transformed now: by a compiler, a function transform or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
    )


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` is at work, and nothing records."""
    transforms = torch._C._are_functorch_transforms_active()
    return transforms and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def known(function: Callable[..., T]) -> Callable[..., T]:
    """Remember the results of a pure function of hashable arguments, in bodies of operators, which nobody traces."""
    remembered = lru_cache(maxsize=4096)(function)
    _memos.append(remembered.cache_clear)
    return remembered


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Do as `known` does where calls may be traced; those, and symbolic sizes, go past what is remembered."""
    remembered = known(function)

    @wraps(function)
    def call(*arguments: object) -> T:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return remembered(*arguments)
        except TypeError:  # a symbolic size has no hash
            return function(*arguments)

    return call


def forget() -> None:
    """Empty what `known` and `once` remember, as a test must that puts another function in place of one it calls."""
    for clear in _memos:
        clear()
