"""One definition of an operator, run in two ways: registered for whoever traces it, and at once in an eager call.

A registered operator has a schema, a shape function and a gradient, which `torch.compile`, export, dispatch modes and
subclasses of Tensor need. An eager call needs the gradient alone: it goes through a plain `torch.autograd.Function` of
the same formulas, as do the transforms of `torch.func`, or straight to the body where nothing requires a gradient. On
the way through the registered operator the host spends as much time as a small kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

from ..eager import PLAIN, is_traced, is_transformed
from .operands import one_device

__all__ = ["Operator", "operator"]
_NO_TENSOR = (type(None), bool, int, float, str, tuple, list)  # which need not be asked whether they are one


class Operator:
    """An operator; calling it computes it.

    Attributes:
        registered: the same as ``torch.ops.patchsparse.NAME.default``.
    """

    def __init__(self, name: str, body: Callable[..., Any]):
        self._body = body
        self._name = name.rpartition("::")[2]
        schema = infer_schema(body, mutates_args=())
        self._definition = custom_op(name, lambda *args: _apart(body(*args), args), mutates_args=(), schema=schema)
        self.registered = self._definition._opoverload
        self.differentiable(_no_context, self._refuse)

    def __call__(self, *arguments: Any) -> Any:
        """Compute the operator."""
        plain, differentiable = not is_traced(), False
        for argument in arguments:
            if type(argument) in PLAIN:
                if argument.requires_grad:
                    differentiable = True
                if argument.is_meta:
                    plain = False
            elif type(argument) not in _NO_TENSOR and isinstance(argument, Tensor):  # a subclass
                plain = False
        if not plain:
            return self._transformable.apply(*arguments) if is_transformed() else self.registered(*arguments)
        if differentiable and torch.is_grad_enabled():
            return self._function.apply(*arguments)
        return self._body(*arguments)

    def shape(self, function: Callable[..., Any]) -> None:
        """Take the function that returns results without values: their shapes, dtypes and strides."""

        def on_one_device(*arguments: Any) -> Any:
            one_device(arguments)
            return function(*arguments)

        self._definition.register_fake(on_one_device)

    def differentiable(self, context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Take what `torch.autograd.Function` calls ``setup_context`` and ``backward``; both ways use them."""
        self._definition.register_autograd(backward, setup_context=context)
        body = self._body

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = body(*arguments)
            context(ctx, arguments, output)
            return output

        # With a context apart torch.func can transform it, but each call binds all arguments to the signature of the
        # body anew, which costs the host 15 us. So there is another one for calls that nothing transforms.
        self._function = _function(self._name, forward=forward, backward=backward)
        self._transformable = _function(self._name, forward=body, setup_context=context, backward=backward)

    def _refuse(self, ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"patchsparse::{self._name} has no derivative: only first derivatives can be taken here")


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Turn an annotated function into an :class:`Operator`, registered by ``name``, ``"patchsparse::NAME"``.

    The function may return None for a tensor, and tensors that share memory with each other or with an argument; the
    registered operator, which may not, returns an empty tensor for None, and copies.
    """
    return lambda body: Operator(name, body)


def _function(name: str, **methods: Callable[..., Any]) -> Any:
    """Return a `torch.autograd.Function` of that name."""
    return type(name, (torch.autograd.Function,), {name: staticmethod(method) for name, method in methods.items()})


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save nothing."""


def _apart(results: Any, arguments: tuple[Any, ...]) -> Any:
    """Return results that are tensors and share no memory with each other or with an argument."""
    if isinstance(results, Tensor):
        return _apart((results,), arguments)[0]
    like = next(a for a in arguments if isinstance(a, Tensor))
    taken = {a.untyped_storage()._cdata for a in arguments if isinstance(a, Tensor)}
    own = []
    for result in results:
        result = like.new_empty(0) if result is None else result
        own.append(result.clone() if result.untyped_storage()._cdata in taken else result)
        taken.add(own[-1].untyped_storage()._cdata)
    return tuple(own)
