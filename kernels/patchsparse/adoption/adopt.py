"""Adopt the modules of a dense model in place, or say which of them has no packed form."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .binding import Binding
from .rules import Rule, find_rule, qualified_name
from .scan import suspicious_call

__all__ = ["Model", "Plan", "UnsupportedModuleError", "adopt", "plan_adoption"]

_POINTWISE_MARK = "patchsparse_pointwise"

Model = TypeVar("Model", bound=nn.Module)
Plan = list[tuple[str, nn.Module, Rule]]


class UnsupportedModuleError(TypeError):
    """A module has no packed form that equals dense-and-mask.

    Attributes:
        path: name of the module in the model, as ``named_modules`` gives it.
    """

    def __init__(self, path: str, module: nn.Module, reason: str):
        self.path = path
        where = f"'{path}'" if path else "the model itself"
        super().__init__(f"{where} ({qualified_name(type(module))}): {reason}")


def adopt(model: Model, plan: Plan, backend: str, fuse: bool | None = None) -> Model:
    """Let ``model`` run on packed patches by the engine ``backend``: adopt the modules of ``plan`` in place."""
    targets = [(path, module, rule.target()) for path, module, rule in plan]
    binding = Binding(backend, fuse)
    for path, module, target in targets:
        if target is not None:
            target.adopt(module, binding, path)
    cast(Any, model).patch_binding = binding  # bind() accepts it even if every module stays
    return model


def plan_adoption(model: nn.Module, *, trust_forward: bool) -> Plan:
    """Return the modules of a dense ``model`` to adopt; nothing is changed.

    Args:
        model: the model.
        trust_forward: do not search ``forward`` methods for calls that could mix patches.

    Raises:
        UnsupportedModuleError: for the first module that cannot be equal to dense-and-mask.
        ValueError: if part of the model is sparsified already.
    """
    plan: Plan = []
    seen: set[int] = set()
    scanned: dict[type, str | None] = {}
    todo = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(getattr(module, "patch_binding", None), Binding):
            raise ValueError(f"'{path}' is sparsified already; call sparsify once, on a dense model")
        rule = find_rule(module)
        if rule is None:
            _check_unknown(path, module, trust_forward, scanned)
        elif (reason := rule.refuse(module)) is not None:
            raise UnsupportedModuleError(path, module, reason)
        elif rule.make is not None and rule.concerns(module):
            obstacle = _obstacle(module)
            if obstacle is None:
                plan.append((path, module, rule))
            elif not rule.optional:
                raise UnsupportedModuleError(path, module, obstacle)
        if rule is None or not rule.whole:
            prefix = f"{path}." if path else ""
            todo.extend((prefix + name, child) for name, child in reversed(list(module.named_children())))
    return plan


def _check_unknown(path: str, module: nn.Module, trust_forward: bool, scanned: dict[type, str | None]) -> None:
    kind = type(module)
    if getattr(kind, _POINTWISE_MARK, False):
        return
    if next(module.children(), None) is None:
        raise UnsupportedModuleError(
            path,
            module,
            "no rule tells how this module acts on packed patches; replace it, or set "
            f"{_POINTWISE_MARK} = True on its class if it treats every pixel by itself",
        )
    if trust_forward:
        return
    if kind not in scanned:
        scanned[kind] = suspicious_call(module)
    if (found := scanned[kind]) is not None:
        raise UnsupportedModuleError(
            path,
            module,
            f"{found} may mix the pixels of different patches; write it as a module that has a rule, or let "
            "sparsify(model, verify=True) find out whether it does",
        )


def _obstacle(module: nn.Module) -> str | None:
    """Return why the class of a module cannot be switched, or None."""
    if is_parametrized(module):
        return "it is parametrized; register the parametrization after sparsify()"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance; undo that before sparsify()"
    return None
