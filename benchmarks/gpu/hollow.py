"""Run PyTorch programs at real sizes without computing: large tensors have an address and a shape, and no contents.

Every operator is asked for its result's shapes on ``meta`` tensors. Where all is small it is then computed as ever, so
that masks, indices, counts and step numbers are right. Otherwise its results are memory that is reserved and never
touched (the system hands out pages when they are written), and in-place operators do nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .fake_torch import is_on_card, making, put_on_card

__all__ = ["SMALL", "Hollow"]

SMALL = 1 << 16  # elements of all arguments and results together, up to which an operator computes
KNOWS_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
COPIES = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_foreach_copy_", "_index_put_impl_", "clone")
COMPOSITE = "CompositeImplicitAutograd"  # made of other operators
UNWRITTEN = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted")


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, also in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _shadow(x: Tensor) -> Tensor:
    """Return a ``meta`` tensor of the same shape and strides."""
    if x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _reserve(x: Tensor, on_card: bool, computed: bool = True) -> Tensor:
    """Return memory for a ``meta`` result, untouched unless it is small.

    Small results are zeros, so that differences are; counts and truths that would follow from large tensors are ones.
    """
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    if made.numel() <= SMALL:
        made.fill_(int(computed and not x.is_floating_point()))
    return put_on_card(made, on_card)


class Hollow(TorchDispatchMode):
    """Compute what is small, and reserve memory for what is not; use through :func:`benchmarks.gpu.fake.fake_gpu`."""

    def __init__(self, operators: Counter[str] | None = None):
        """Begin to count in ``operators`` those that start work on the card."""
        super().__init__()
        self.operators: Counter[str] = Counter() if operators is None else operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims", "prim"):
            registered = OPDEFS.get(func.name().split(".")[0])
            if registered is None:
                return func(*args, **kwargs)
            with self:
                return registered._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):  # met below autograd only
            with self:
                return func.decompose(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        on_card = making.on_card or any(map(is_on_card, given))
        _check_devices(func, given, on_card)
        returns = func._schema.returns
        aliased = [r.alias_info for r in returns]
        if any(a is not None and not a.is_write for a in aliased):
            return func(*args, **kwargs)  # a view: it shares the memory, and the mark
        if on_card and func.overloadpacket.__name__ not in UNWRITTEN:
            self.operators[func.overloadpacket.__name__] += 1
        written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        small = sum(t.numel() for t in given) <= SMALL
        if written:
            return func(*args, **kwargs) if small else _unwritten(func, args, kwargs, on_card)
        return self._functional(func, args, kwargs, small, on_card)

    def _functional(self, func: Any, args: Any, kwargs: Any, small: bool, on_card: bool) -> Any:
        """Run an operator that only returns new tensors."""
        if any(tag in func.tags for tag in KNOWS_BY_VALUE) and func.overloadpacket.__name__ != "index":
            return _marked(func(*args, **kwargs), on_card)
        if func is torch.ops.aten.index.Tensor and not small:
            args = (args[0], _rows_of(args[1]))
        try:
            results = _shapes(func, args, kwargs)
        except (NotImplementedError, RuntimeError):
            if not small:
                raise
            return _marked(func(*args, **kwargs), on_card)  # its shape follows from values
        unwritten = func.overloadpacket.__name__ in UNWRITTEN
        outputs = sum(t.numel() for t in _tensors(results if isinstance(results, (list, tuple)) else [results]))
        if small and outputs <= SMALL and not unwritten:
            return _marked(func(*args, **kwargs), on_card)
        # Nothing is wrong with values that nobody knows: a loop for as long as any is (`trunc_normal_`) ends.
        computed = not unwritten and func.overloadpacket.__name__ != "any"
        return tree_map_only(Tensor, lambda t: _reserve(t, on_card, computed), results)


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the results of an operator as ``meta`` tensors."""
    args, kwargs = tree_map_only(Tensor, _shadow, (args, kwargs))
    if any(a.name == "device" for a in func._schema.arguments):
        kwargs = kwargs | {"device": torch.device("meta")}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "generator")}
    results = func(*args, **kwargs)
    if func is torch.ops.aten.convolution.default and torch.channels_last in map(suggest_memory_format, args[:2]):
        return results.contiguous(memory_format=torch.channels_last)  # as cuDNN does; meta tensors have no such rule
    return results


def _rows_of(indices: Any) -> list[Any]:
    """Return indices whose masks are indices, too; of a large mask, whose values nobody knows, all is chosen."""
    found: list[Any] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
            continue
        count = int(index.sum()) if index.numel() <= SMALL else index.numel()
        found += [torch.empty(count, dtype=torch.int64, device="meta") for _ in range(index.dim())]
    return found


def _marked(results: Any, on_card: bool) -> Any:
    return tree_map_only(Tensor, lambda t: put_on_card(t, on_card), results)


def _unwritten(func: Any, args: Any, kwargs: Any, on_card: bool) -> Any:
    """Return what an operator returns that writes into arguments, without writing."""
    arguments, returns = func._schema.arguments, func._schema.returns
    bound = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    own = {frozenset(a.alias_info.before_set): bound[a.name] for a in arguments if a.alias_info is not None}
    results = [None if r.alias_info is None else own[frozenset(r.alias_info.before_set)] for r in returns]
    if any(r is None for r in results):
        shapes = _shapes(func, args, kwargs)
        shapes = shapes if isinstance(shapes, tuple) else (shapes,)
        results = [_reserve(s, on_card) if r is None else r for r, s in zip(results, shapes, strict=True)]
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def _check_devices(func: Any, given: list[Tensor], on_card: bool) -> None:
    """Raise RuntimeError if an operator mixes tensors of the card with others, as on a GPU; scalars may mix."""
    if not on_card or making.on_card or func.overloadpacket.__name__ in COPIES:
        return
    others = [tuple(t.shape) for t in given if t.dim() and not is_on_card(t)]
    if others:
        raise RuntimeError(f"{func}: expected all tensors on cuda:0, found {others} on the CPU")
