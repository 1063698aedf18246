"""What optimisers share whose rates may lie on the device, where a CUDA graph reads them.

A step of such an optimiser has two parts. ``advance()`` counts it on the host and returns the rates of each group,
three numbers; ``move(rates, decays)`` moves the weights by these numbers, a small tensor, and reads nothing back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Lists", "Movable", "Rates", "adam", "on_cpu", "tensors_of", "to_device"]

_torch: Any = torch  # type checkers do not know its kernels for lists of tensors


class Movable(Protocol):
    """Say what a captured step needs of an optimiser."""

    param_groups: list[dict[str, Any]]
    state: Any

    def advance(self) -> list[tuple[float, float, float]]:
        """Count the step; return the learning rate, the weight decay and the number of the step of each group."""
        ...

    def move(self, rates: Tensor, decays: Sequence[bool]) -> None:
        """Move the weights by ``rates`` ``(groups, 3)`` float32 on their device, in the order of `advance`.

        ``decays`` says of which groups the weight decay is not 0.
        """
        ...


class Rates(NamedTuple):
    """Hold the numbers that one group shares in one step; the first three may be scalars on the device."""

    lr: float | Tensor
    weight_decay: float | Tensor
    step: float | Tensor
    decays: bool
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(
        cls,
        group: Mapping[str, Any],
        lr: float | Tensor,
        weight_decay: float | Tensor,
        step: float | Tensor,
        decays: bool,
    ) -> Rates:
        """Take the constants from a group of an optimiser."""
        beta1, beta2 = group["betas"]
        return cls(lr, weight_decay, step, decays, beta1, beta2, group["eps"])


class Lists(NamedTuple):
    """Hold the tensors of one group, parameter by parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]


def on_cpu(tensor: Tensor) -> bool:
    """Tell whether a tensor is where reading it waits for nothing."""
    return tensor.device.type == "cpu"


def to_device(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Send a small table to a device in float32, without waiting for it."""
    table = torch.tensor(rows, dtype=torch.float32)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def tensors_of(parameters: Iterable[Tensor], states: Any) -> Lists:
    """Return the parameters that have a gradient, with it and both moments, which begin with 0."""
    lists = Lists([], [], [], [])
    for parameter in parameters:
        if parameter.grad is None:
            continue
        state = states[parameter]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        grad = parameter.grad
        if not _same_order(grad, parameter):
            grad = torch.empty_like(parameter).copy_(grad)
        for values, value in zip(lists, (parameter, grad, state["exp_avg"], state["exp_avg_sq"]), strict=True):
            values.append(value)
    return lists


def adam(lists: Lists, targets: list[Tensor], lr: float | Tensor, rates: Rates) -> None:
    """Move both moments, and subtract ``lr`` times Adam's update from ``targets``, in one pass."""
    step = rates.step
    if not isinstance(step, Tensor):
        step = torch.full((), float(step), device=targets[0].device)  # filled there: a copy would wait
    _torch._fused_adam_(
        targets,
        lists.grads,
        lists.firsts,
        lists.seconds,
        [],
        [step] * len(targets),
        lr=lr,
        beta1=rates.beta1,
        beta2=rates.beta2,
        weight_decay=0.0,
        eps=rates.eps,
        amsgrad=False,
        maximize=False,
    )


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Return whether the elements of two tensors of one shape lie in memory in one order."""
    steps = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(length == 1 or a == b for length, a, b in steps)
