"""Let tensors in the memory of the host say that they are on a GPU, and ``torch.cuda`` that there is one.

Names of torch are replaced by functions of this file, all at once and for a ``with`` block: what makes tensors, what
moves them, what tells where they are, autocast, and ``torch.cuda`` (``fake_cuda.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # its table of torch's functions must be made from the real ones
from torch import Tensor
from torch.fx.experimental import _config

from .fake_cards import Card
from .fake_cuda import fake_cuda

__all__ = ["is_on_card", "making", "pretend", "put_on_card"]

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
MAKERS = (
    *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace"),
    *("eye", "tensor", "as_tensor", "asarray", "scalar_tensor", "empty_strided", "empty_permuted", "empty_like"),
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "tril_indices"),
    "triu_indices",
)
NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
AUTOCAST = ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype")


making = SimpleNamespace(on_card=False)  # whether a tensor is being made on the card


def is_on_card(x: Tensor) -> bool:
    """Return whether the memory of a tensor was marked as the card's; views share the mark."""
    return getattr(x.untyped_storage(), "on_card", False)


def put_on_card(x: Tensor, on_card: bool = True) -> Tensor:
    """Mark the memory of a tensor, and return the tensor."""
    setattr(x.untyped_storage(), "on_card", on_card)  # noqa: B010  kept as long as the memory
    return x


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


def _maker(make: Callable[..., Tensor], hollow: bool) -> Callable[..., Tensor]:
    """Return a function that makes tensors on the host and marks those asked for on the card."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        if device is None:
            return make(*args, **kwargs)
        if not _is_cuda(device):
            result = make(*args, device=device, **kwargs)
            return put_on_card(result, False) if hollow and result.device.type == "cuda" else result
        if hollow and args and make.__name__ in ("as_tensor", "asarray"):
            return _moved(make(*args, **kwargs), True)
        if not hollow:
            return make(*args, device=HOST, **kwargs)
        making.on_card = True
        try:
            return put_on_card(make(*args, device=HOST, **kwargs))
        finally:
            making.on_card = False

    return made


def _moved(x: Tensor, on_card: bool) -> Tensor:
    """Return a copy on the other side, or ``x`` if it is there."""
    return x if is_on_card(x) == on_card else put_on_card(x.clone(), on_card)


def _mover(to: Callable[..., Tensor], hollow: bool) -> Callable[..., Tensor]:
    """Return ``Tensor.to`` that moves by copy and mark."""

    def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = None
        if "device" in kwargs:
            target = kwargs.pop("device")
        elif args and isinstance(args[0], Tensor):
            target, args = args[0].device, (args[0].dtype, *args[1:])
        elif args and isinstance(args[0], (str, int, torch.device)):
            target, args = args[0], args[1:]
        if target is not None and torch.device(target).type == "meta":
            return to(x, "meta", *args, **kwargs)
        result = to(x, HOST, *args, **kwargs) if target is not None and not x.is_meta else to(x, *args, **kwargs)
        if target is None or not hollow:
            return result
        return _moved(result, _is_cuda(target))

    return moved


class Generator(torch.Generator):
    """A generator of the host that may say it is the card's."""

    said: torch.device = HOST

    def __new__(cls, device: Any = HOST) -> Generator:
        """Return a new generator; ``device`` is what it will say."""
        self = super().__new__(cls, HOST)  # pyright: ignore[reportCallIssue]
        self.said = DEVICE if _is_cuda(device) else HOST
        return self

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where it says it is."""
        return self.said


def _tensor(hollow: bool) -> dict[str, Any]:
    """Return what replaces attributes of ``Tensor``."""

    def where(x: Tensor) -> torch.device:
        own = _device.__get__(x)
        if own.type != "cpu":
            return own
        return DEVICE if not hollow or is_on_card(x) else HOST

    names: dict[str, Any] = {name: _maker(getattr(Tensor, name), hollow) for name in NEW}
    to = _mover(Tensor.to, hollow)
    names |= {
        "device": property(where),
        "is_cuda": property(lambda x: where(x).type == "cuda"),
        "is_cpu": property(lambda x: where(x).type == "cpu"),
        "get_device": lambda x: 0 if where(x).type == "cuda" else -1,
        "to": to,
        "cuda": lambda x, device=None, **kwargs: to(x, DEVICE),
        "cpu": lambda x, **kwargs: to(x, HOST),
        "pin_memory": lambda x, *args: x,
        "is_pinned": lambda x, *args: where(x).type == "cpu",
        "record_stream": lambda x, stream: None,
        "__deepcopy__": _deep_copier(Tensor.__deepcopy__),
    }
    return names


def _deep_copier(copied: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what copies a tensor to where it is; copies of storages do not say that they are on the card."""

    def deep_copy(x: Tensor, memo: dict[int, Any]) -> Tensor:
        if type(x) is not Tensor or not is_on_card(x):
            return copied(x, memo)
        return memo.setdefault(id(x), put_on_card(x.detach().clone().requires_grad_(x.requires_grad), True))

    return deep_copy


_device = torch._C.TensorBase.device  # as it was


def _unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a maker that knows no pinned memory."""

    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs)

    return made


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of autocast that takes ``"cuda"`` for ``"cpu"``."""

    @functools.wraps(function)
    def asked(device: Any = "cuda", *args: Any) -> Any:
        return function("cpu" if device == "cuda" else device, *args)

    return asked


def _uncompiled(model: Any = None, **options: Any) -> Any:
    """Return what ``torch.compile`` was given: compiled programs run as they are written."""
    return (lambda function: function) if model is None else model


@contextmanager
def pretend(card: Card, hollow: bool) -> Iterator[None]:
    """Replace the names of torch inside the ``with`` block.

    Args:
        card: what ``torch.cuda`` describes.
        hollow: whether tensors are on the card only if they were put there; else all say that they are.
    """
    makers = {name: _maker(getattr(torch, name), hollow) for name in MAKERS}
    makers |= {name: _unpinned(makers[name]) for name in ("empty", "zeros", "ones", "full", "empty_like", "tensor")}
    autocast = {name: _on_host(getattr(torch, name)) for name in AUTOCAST}
    with ExitStack() as stack:
        # Nobody knows what is true in a large mask: it indexes as if all were.
        stack.enter_context(mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", hollow))
        for owner, names in (
            (torch.cuda, fake_cuda(card)),
            (torch, makers | autocast | {"Generator": Generator, "compile": _uncompiled}),
            (torch.nn.Module, {"compile": lambda module, *args, **kwargs: None}),
            (Tensor, _tensor(hollow)),
        ):
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        yield
