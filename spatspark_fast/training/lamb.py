"""LAMB in few kernels on a GPU and few passes over memory on a CPU; the numbers are those of timm's `Lamb`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Lamb", "clip_gradients"]

CHUNK = 1 << 16  # elements; the five arrays of a chunk (1.3 MB in float32) stay in a core's second-level cache


_torch: Any = torch  # type checkers do not know its kernels for lists of tensors


class _Rates(NamedTuple):
    """Hold the numbers that one group shares in one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class _Lists(NamedTuple):
    """Hold the tensors of one group, parameter by parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]


class Lamb(Optimizer):
    """Scale Adam's update of each parameter by ``|weight| / |update|`` (LAMB, arXiv 1904.00962).

    As timm's `Lamb` with bias correction and averaged gradients, and without gradient clipping, which is
    `clip_gradients`' part: weight decay is added to the update before its norm is taken, and groups without
    weight decay take Adam's update as it is. The state has timm's names, and either loads the other's.

    Parameters may be on any device, in any dense memory format. Adam's part is PyTorch's fused kernel, which
    writes its update into zeros here. On a CPU the rest goes through memory in pieces that fit a cache; on a
    GPU it is a fixed number of calls for each group. No value is read back from a GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the weights once; return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1  # a tensor on the CPU in timm's checkpoints
            lists = self._lists(group["params"])
            if not lists.params:
                continue
            beta1, beta2 = group["betas"]
            rates = _Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"])
            on_cpu = all(parameter.device.type == "cpu" for parameter in lists.params)
            (_update_in_pieces if on_cpu else _update_together)(lists, rates)
        return loss

    def _lists(self, parameters: Iterable[Tensor]) -> _Lists:
        lists = _Lists([], [], [], [])
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            grad = parameter.grad
            if not _same_order(grad, parameter):
                grad = torch.empty_like(parameter).copy_(grad)
            for values, value in zip(lists, (parameter, grad, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                values.append(value)
        return lists


def _trust(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """Return ``|weight| / |update|``, 1 where either is 0."""
    ratio = weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)


def _adam(lists: _Lists, targets: list[Tensor], lr: float, rates: _Rates) -> None:
    """Move both moments, and subtract ``lr`` times Adam's update from ``targets``, in one pass."""
    step = torch.full((), float(rates.step), device=targets[0].device)  # filled there: a copy would wait
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


def _update_together(lists: _Lists, rates: _Rates) -> None:
    """Update all parameters of a group by a fixed number of calls, each of which takes them all."""
    params = lists.params
    if rates.weight_decay == 0:
        _adam(lists, params, rates.lr, rates)
        return
    zeros = params[0].new_zeros(sum(parameter.numel() for parameter in params))
    parts = zeros.split([parameter.numel() for parameter in params])
    updates = [
        part.as_strided(p.shape, p.stride(), part.storage_offset()) for part, p in zip(parts, params, strict=True)
    ]
    _adam(lists, updates, -1.0, rates)
    _torch._foreach_add_(updates, params, alpha=rates.weight_decay)
    norms = (torch.stack(_torch._foreach_norm(tensors)) for tensors in (params, updates))
    trust = _trust(*norms).mul_(-rates.lr)
    # One call: foreach has no fast way to scale each tensor by a scalar on the device and then to add it.
    _torch._foreach_addcmul_(params, updates, list(trust.unbind()))


def _update_in_pieces(lists: _Lists, rates: _Rates) -> None:
    """Update parameter by parameter, and each of them in pieces that a cache holds until their norm is taken."""
    flat = _Lists(*([_flat(tensor) for tensor in tensors] for tensors in lists))
    if rates.weight_decay == 0:
        _adam(flat, flat.params, rates.lr, rates)
        return
    # One scratch for all parameters: fresh memory would cost a page fault every 4 kB.
    scratch = flat.params[0].new_empty(max(parameter.numel() for parameter in flat.params))
    for weights, *others in zip(*flat, strict=True):
        updates = scratch[: len(weights)]
        squares: list[Tensor] = []
        for weight, grad, first, second, update in zip(
            *(tensor.split(CHUNK) for tensor in (weights, *others, updates)), strict=True
        ):
            _adam(_Lists([weight], [grad], [first], [second]), [update.zero_()], -1.0, rates)
            update.add_(weight, alpha=rates.weight_decay)
            squares += [weight.dot(weight), update.dot(update)]
        norms = torch.stack(squares).view(-1, 2).double().sum(0).sqrt_()
        weights.add_(updates, alpha=-rates.lr * float(_trust(norms[0], norms[1])))


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Return whether the elements of two tensors of one shape lie in memory in one order."""
    steps = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(length == 1 or a == b for length, a, b in steps)


def _flat(tensor: Tensor) -> Tensor:
    """Return all elements in the order of memory, which is the same for a weight, its gradient and its state."""
    formats = [torch.contiguous_format, *([torch.channels_last] if tensor.ndim == 4 else [])]
    if not any(tensor.is_contiguous(memory_format=each) for each in formats):
        raise ValueError(f"LAMB needs contiguous or channels_last weights, got strides {tensor.stride()}")
    return tensor.detach().as_strided((tensor.numel(),), (1,))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that the norm of the whole is at most ``limit``; return the norm before, a scalar.

    Without a limit the norm is only measured. Nothing is read back from the device. Equivalent to::

        torch.nn.utils.clip_grad_norm_(parameters, limit)
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(_torch._foreach_norm(grads)))
    if limit is not None:
        scale = (limit / (norm + 1e-6)).clamp_(max=1.0)
        if norm.device.type == "cpu" and float(scale) == 1.0:  # reading it waits for nothing here
            return norm
        _torch._foreach_mul_(grads, scale)
    return norm
