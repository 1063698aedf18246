"""Turn a dense convolutional network into one that also runs on packed patches, in place."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..backends import ENGINES
from .binding import Binding
from .rules import POINTWISE, Rule, find_rule, qualified_name
from .scan import suspicious_call

__all__ = ["UnsupportedModuleError", "sparsify"]

_POINTWISE_MARK = "patchsparse_pointwise"

Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModuleError(TypeError):
    """A module has no packed form that equals dense-and-mask.

    Attributes:
        path: name of the module in the model, as ``named_modules`` gives it.
    """

    def __init__(self, path: str, module: nn.Module, reason: str):
        self.path = path
        where = f"'{path}'" if path else "the model itself"
        super().__init__(f"{where} ({qualified_name(type(module))}): {reason}")


def sparsify(model: Model, *, backend: str = "auto", verify: bool = False) -> Model:
    """Make ``model`` run on packed patches whenever a grid is bound, and as before when none is.

    Modules that look at one pixel stay. Spatial ones, and those that reduce over an image, change their class
    in
    place: Parameters, buffers, hooks, state-dict keys and ``isinstance`` answers remain. The whole tree is
    checked before anything changes, so a refused model is left untouched.

    ``forward`` methods of containers are searched for functional calls that could mix patches (a mean over
    the image, pooling, padding, attention). Such a call is refused, unless ``verify`` shows it to be
    harmless. A module class that you vouch for (each pixel by itself) may say so: ``patchsparse_pointwise =
    True``.

    Args:
        model: any module; no part of it may be sparsified already.
        backend: engine of the spatial modules, see :func:`patchsparse.explain`.
        verify: run a small random input through copies of the model, packed and as dense-and-mask, in
        float64,
            and compare the output of every module. See :func:`patchsparse.testing.check_parity` for other
            sizes.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModuleError: naming the module, the reason and a remedy.
        ValueError: if ``backend`` is unknown, part of the model is sparsified, or ``verify`` could not run it.
    """
    if backend != "auto" and backend not in ENGINES:
        raise ValueError(f"backend {backend!r} is unknown; choose one of auto, {', '.join(ENGINES)}")
    plan = _plan(model, trust_forward=verify)
    if verify:
        from .parity import check_parity  # imports this module

        check_parity(model)
    binding = Binding(backend)
    _apply(model, plan, binding)
    return model


def sparsify_copy(model: Model, backend: str) -> Model:
    """Return a sparsified deep copy, trusting every ``forward``: the candidate of the parity check."""
    clone = copy.deepcopy(model)
    _apply(clone, _plan(clone, trust_forward=True), Binding(backend))
    return clone


Plan = list[tuple[str, nn.Module, Rule]]


def _apply(model: nn.Module, plan: Plan, binding: Binding) -> None:
    targets = [(path, module, rule.target()) for path, module, rule in plan]
    for path, module, target in targets:
        if target is not None:
            target.adopt(module, binding, path)
    cast(Any, model).patch_binding = binding  # bind() accepts it even if every module stays


def _plan(model: nn.Module, trust_forward: bool) -> Plan:
    """Return the modules to adopt, or raise for the first module that cannot be equal."""
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
        elif rule.make is not None:
            obstacle = _obstacle(module)
            if obstacle is None:
                plan.append((path, module, POINTWISE if _pointwise(module) else rule))
            elif not rule.optional:
                raise UnsupportedModuleError(path, module, obstacle)
        if rule is None or not rule.whole:
            prefix = f"{path}." if path else ""
            todo.extend((prefix + name, child) for name, child in reversed(list(module.named_children())))
    return plan


def _pointwise(module: nn.Module) -> bool:
    """Whether a convolution is 1x1 without stride, so that it also takes what is not packed (one pixel per image)."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
    )


def _check_unknown(path: str, module: nn.Module, trust_forward: bool, scanned: dict[type, str | None]) -> None:
    kind = type(module)
    if getattr(kind, _POINTWISE_MARK, False):
        return
    if next(module.children(), None) is None:
        raise UnsupportedModuleError(
            path,
            module,
            "no rule tells how this module acts on packed patches; replace it, or if it treats every pixel "
            "by itself "
            f"set {_POINTWISE_MARK} = True on its class",
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
