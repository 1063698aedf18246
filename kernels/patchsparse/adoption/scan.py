"""Search the source of a container's ``forward`` for calls that may look beyond a patch.

Modules are judged by the rule table; a functional call inside a ``forward`` cannot be. This reads the code
instead of running it: it is quick, needs no input, and errs on the safe side. ``sparsify(..., verify=True)``
decides by running.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType
from typing import Any

from torch import nn

__all__ = ["suspicious_call"]

_REDUCTIONS = (
    "mean sum prod amax amin max min median mode norm vector_norm var std var_mean std_mean softmax log_softmax "
    "logsumexp normalize cumsum cumprod sort argsort topk argmax argmin quantile reduce"
)
_MIXING = (
    "matmul bmm baddbmm mm einsum tensordot scaled_dot_product_attention attention interpolate upsample grid_sample "
    "affine_grid pad roll flip rot90 fold unfold rearrange conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "max_pool1d max_pool2d avg_pool1d avg_pool2d lp_pool2d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_max_pool2d group_norm instance_norm batch_norm meshgrid linspace arange"
)
_PER_SAMPLE = (
    "drop_path drop_block_2d dropout2d feature_dropout alpha_dropout bernoulli bernoulli_ rand randn rand_like"
)
_SUSPICIOUS = frozenset(f"{_REDUCTIONS} {_MIXING} {_PER_SAMPLE}".split())
_BUILTINS = frozenset({"sum", "max", "min"})


def suspicious_call(module: nn.Module) -> str | None:
    """Name the first call in ``forward`` that may mix the pixels of different patches, or None.

    Methods of the module and functions of the same package that ``forward`` calls are read too. Source that
    cannot be read counts as suspicious.
    """
    kind = type(module)
    todo: list[FunctionType] = [_plain(kind.forward)]
    seen: set[Any] = set()
    while todo:
        function = todo.pop(0)
        if function in seen:
            continue
        seen.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return f"{function.__qualname__}, whose source cannot be read"
        for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
            found = _judge(node)
            if found is not None:
                return f"{found} in {function.__qualname__}"
            called = _callee(node, kind, function)
            if called is not None:
                todo.append(called)
    return None


def _judge(node: ast.AST) -> str | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return "a matrix product (@)"
    if not isinstance(node, ast.Call):
        return None
    call = node.func
    if isinstance(call, ast.Attribute) and call.attr in _SUSPICIOUS:
        own = isinstance(call.value, ast.Name) and call.value.id == "self"  # a submodule, judged by the table
        return None if own else f"{ast.unparse(call)}(...)"
    if isinstance(call, ast.Name) and call.id in _SUSPICIOUS - _BUILTINS:
        return f"{call.id}(...)"
    return None


def _callee(node: ast.AST, kind: type, caller: FunctionType) -> FunctionType | None:
    """Return the function that ``node`` calls: a method of ``kind`` or a function of the same package."""
    if not isinstance(node, ast.Call):
        return None
    call = node.func
    target: Any = None
    if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "self":
        target = None if hasattr(nn.Module, call.attr) else getattr(kind, call.attr, None)
    elif isinstance(call, ast.Name):
        target = caller.__globals__.get(call.id)
    target = _plain(target)
    if not isinstance(target, FunctionType):
        return None
    package = kind.__module__.split(".")[0]
    return target if target.__module__.split(".")[0] == package and package != "torch" else None


def _plain(function: Any) -> Any:
    return inspect.unwrap(function) if callable(function) else function
