"""Batch norm, what is added to it and the activation after it as one operator, where an engine makes that faster.

A norm alone cannot know what follows it. So the container that calls both is adopted too, and calls :func:`norm_act`
in their place. Whatever is not exactly a norm and an activation that the operator has, with nothing between and
nobody listening, runs module by module as in the dense model.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends import FUSED_NORMS, choose
from ..functional import patch_batch_norm_act
from ..ops.calls import norm_call
from .binding import Binding
from .modules import PatchModule

__all__ = [
    "NOTHING",
    "PatchBatchNorm2d",
    "PatchContainer",
    "PatchNorm",
    "PatchSequential",
    "fuses",
    "holds_pair",
    "in_pairs",
    "is_watched",
    "norm_act",
    "why_apart",
    "why_not_one",
]

# What an activation module is called by the operator.
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
}
NOTHING = nn.Identity()
_WATCHED = "a hook wants to see what each module returns"
Named = Iterable[tuple[str, Any]]


def fuses(binding: Binding, x: Tensor) -> bool:
    """Return whether norms run as one operator with what follows them, on packed patches such as ``x``.

    They do if ``sparsify`` was told so, or if the engine that takes the norms is faster that way.
    """
    if binding.current() is None or x.dim() != 4:
        return False
    if binding.fuse is not None:
        return binding.fuse
    return choose(norm_call("batch_norm_act", x, x.shape[0]), binding.backend) in FUSED_NORMS


class PatchNorm(PatchModule):
    """Base of the batch norms: packed patches hold the active pixels alone, so that their statistics are the batch's.

    Where the binding joins processes, statistics are those of all of them.
    """

    def inner(self) -> tuple[nn.Module, ...]:
        """Return the modules that the norm itself calls after normalising."""
        return ()

    def joins(self) -> bool:
        """Return whether the statistics are those of several processes."""
        return self.patch_binding.all_gather is not None and self.patch_binding.current() is not None

    def with_activation(self, x: Tensor, act: Any, residual: Tensor | None = None) -> Tensor:
        """Return ``act(norm(x) + residual)`` by one operator; count the batch as PyTorch's module does."""
        norm, binding = cast(Any, self), self.patch_binding
        training, momentum = norm.training, norm.momentum
        used = norm.track_running_stats or not training
        mean, var, batches = (norm.running_mean, norm.running_var, norm.num_batches_tracked) if used else (None,) * 3
        if training and batches is not None and momentum is None:  # a cumulative average
            batches.add_(1)
            momentum, batches = 1.0 / float(batches), None
        return patch_batch_norm_act(
            x,
            norm.weight,
            norm.bias,
            mean,
            var,
            training,
            momentum or 0.0,
            norm.eps,
            ACTIVATIONS[type(act)],
            act.negative_slope if type(act) is nn.LeakyReLU else 0.0,
            residual,
            binding.backend,
            binding.all_gather,
            batches,
        )


class PatchBatchNorm2d(PatchNorm, nn.BatchNorm2d):
    """Normalise over the active pixels, which are all that packed patches hold."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape."""
        return self.with_activation(input, NOTHING) if self.joins() else super().forward(input)


def norm_act(x: Tensor, norm: Any, act: Any, between: Iterable[Any] = (), residual: Tensor | None = None) -> Tensor:
    """Return ``act(norm(x) + residual)``, by one operator unless :func:`why_apart` has a reason against it.

    Args:
        x: ``(N, C, p, p)``.
        norm: a module.
        act: a module.
        between: modules that are called after the norm; None is left out.
        residual: ``(N, C, p, p)`` that is added before the activation, or None.
    """
    between = [module for module in between if module is not None]
    if why_apart(x, norm, act, between, residual) is None:
        return norm.with_activation(x, act, residual)
    y = norm(x)
    for module in between:
        y = module(y)
    if residual is not None:
        y += residual
    return act(y)


def why_apart(
    x: Tensor, norm: Any, act: Any, between: Iterable[Any] = (), residual: Tensor | None = None
) -> str | None:
    """Return why a norm and what follows it must be called one by one, or None if one operator can do it."""
    if not isinstance(norm, PatchNorm):
        return f"{type(norm).__name__} is not a batch norm that sparsify adopts"
    if residual is not None and residual.dtype != x.dtype:
        return f"{residual.dtype} is added to {x.dtype}"
    if is_watched(norm):
        return _WATCHED
    return why_not_one((*norm.inner(), *between), act, residual)


def why_not_one(between: Iterable[Any], act: Any, residual: Tensor | None = None) -> str | None:
    """Return why a norm cannot be one operator with the modules ``between`` and what follows them, or None."""
    if type(act) is nn.Identity and residual is None:
        return "nothing follows the norm: PyTorch's is as good"
    if type(act) not in ACTIVATIONS:
        return f"{type(act).__name__} is not among {', '.join(kind.__name__ for kind in ACTIVATIONS)}"
    for module in between:
        if type(module) is not nn.Identity:
            return f"{type(module).__name__} stands between norm and activation"
        if is_watched(module):
            return _WATCHED
    return _WATCHED if is_watched(act) or _has_any_global_hook() else None


def is_watched(module: Any) -> bool:
    """Return whether calling the module does more than its ``forward``, or that has been overridden."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class PatchContainer(PatchModule):
    """Base of the modules that call a norm and its activation, adopted for that alone."""

    patch_binding: Binding | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # None in a slice

    def fuses(self, x: Any) -> bool:
        """Return whether to call norms and activations in one, as far as they allow it."""
        return self.patch_binding is not None and isinstance(x, Tensor) and fuses(self.patch_binding, x)


class PatchSequential(PatchContainer, nn.Sequential):
    """Call modules one after the other, a batch norm together with the activation that follows it."""

    def forward(self, input: Any) -> Any:
        """Return the output of the last module."""
        if not self.fuses(input):
            return super().forward(input)
        for _, module, norm in in_pairs(self._modules.items()):
            input = module(input) if norm is None else norm_act(input, norm, module)
        return input


def in_pairs(modules: Named, kept: Container[str] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, module and None in order, or an activation's name, the activation and the norm right before it.

    The output of modules whose name is ``kept`` is wanted: such a norm stays alone.
    """
    norm: tuple[str, Any] | None = None
    for name, module in modules:
        if norm is not None and type(module) in ACTIVATIONS:
            yield name, module, norm[1]
            norm = None
            continue
        if norm is not None:
            yield *norm, None
        norm = (name, module) if isinstance(module, PatchNorm) and name not in kept else None
        if norm is None:
            yield name, module, None
    if norm is not None:
        yield *norm, None


def holds_pair(container: nn.Module) -> bool:
    """Return whether a batch norm is followed by an activation that the operator has."""
    return any(
        type(norm) is nn.BatchNorm2d and type(act) in ACTIVATIONS
        for norm, act in pairwise(container._modules.values())  # children() leaves out what comes again
    )
