"""LAMB in few kernels on a GPU and few passes over memory on a CPU; the numbers are those of timm's `Lamb`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spatspark_fast.training.device_rates import Lists, Rates, adam, on_cpu, tensors_of, to_device

__all__ = ["Lamb", "clip_gradients"]

CHUNK = 1 << 16  # elements; the five arrays of a chunk (1.3 MB in float32) stay in a core's second-level cache
ROW = 1024  # elements of one row of the updates on a GPU; no row holds elements of two parameters


_torch: Any = torch  # type checkers do not know its kernels for lists of tensors


class Lamb(Optimizer):
    """Scale Adam's update of each parameter by ``|weight| / |update|`` (LAMB, arXiv 1904.00962).

    As timm's `Lamb` with bias correction and averaged gradients, and without gradient clipping, which is
    `clip_gradients`' part: weight decay is added to the update before its norm is taken, and groups without
    weight decay take Adam's update as it is. The state has timm's names, and either loads the other's.

    Parameters may be on any device, in any dense memory format. Adam's part is PyTorch's fused kernel, which
    moves a scratch copy here. On a CPU the rest goes through memory in pieces that fit a cache; on a GPU it is a
    fixed number of calls for each group, and the rates lie on the device, so that a CUDA graph can hold them:
    `step` is `advance`, on the host, and `move`, on the device. No value is read back.
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
        numbers = self.advance()
        first = self.param_groups[0]["params"][0]
        if on_cpu(first):
            for group, (lr, weight_decay, step) in zip(self.param_groups, numbers, strict=True):
                lists = self._lists(group["params"])
                if lists.params:
                    _update_in_pieces(lists, Rates.of(group, lr, weight_decay, step, weight_decay != 0))
        else:
            self.move(to_device(numbers, first.device), [decay != 0 for _, decay, _ in numbers])
        return loss

    def advance(self) -> list[tuple[float, float, float]]:
        """Count the step; return the learning rate, the weight decay and the number of the step of each group."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1  # a tensor on the CPU in timm's checkpoints
        return [(group["lr"], group["weight_decay"], float(group["step"])) for group in self.param_groups]

    @torch.no_grad()
    def move(self, rates: Tensor, decays: Sequence[bool]) -> None:
        """Move the weights by ``rates`` ``(groups, 3)`` float32 on their device, in the order of `advance`.

        ``decays`` says of which groups the weight decay is not 0: the others take Adam's update as it is.
        """
        for group, row, decay in zip(self.param_groups, rates, decays, strict=True):
            lists = self._lists(group["params"])
            if lists.params:
                lr, weight_decay, step = row.unbind()
                _update_together(lists, Rates.of(group, lr, weight_decay, step, decay))

    def _lists(self, parameters: Iterable[Tensor]) -> Lists:
        return tensors_of(parameters, self.state)


def _trust(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """Return ``|weight| / |update|``, 1 where either is 0."""
    ratio = weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)


@lru_cache(maxsize=16)
def _owners(numels: tuple[int, ...], device: torch.device) -> Tensor:
    """Return for each row of `ROW` elements the number of the parameter that it belongs to, ``(rows, 1)``."""
    rows = torch.tensor([-(-numel // ROW) for numel in numels])
    return torch.repeat_interleave(torch.arange(len(numels)), rows).unsqueeze(1).to(device)


def _update_together(lists: Lists, rates: Rates) -> None:
    """Update all parameters of a group by a fixed number of calls, each of which takes them all."""
    params = lists.params
    if not rates.decays:
        adam(lists, params, rates.lr, rates)
        return
    owners = _owners(tuple(parameter.numel() for parameter in params), params[0].device)
    flat = params[0].new_empty(len(owners), ROW)
    updates, start = [], 0
    for parameter in params:
        updates.append(flat.as_strided(parameter.shape, parameter.stride(), start))
        start += -(-parameter.numel() // ROW) * ROW
    _torch._foreach_copy_(updates, params)
    flat.mul_(rates.weight_decay)
    adam(lists, updates, -1.0, rates)
    norms = torch.stack(_torch._foreach_norm([*params, *updates])).view(2, -1)
    trust = _trust(*norms.unbind()).mul_(rates.lr)
    # Row by row: foreach has no fast way to scale each tensor by a scalar on the device.
    flat.mul_(trust[owners])
    _torch._foreach_sub_(params, updates)


def _update_in_pieces(lists: Lists, rates: Rates) -> None:
    """Update parameter by parameter, and each of them in pieces that a cache holds until their norm is taken."""
    flat = Lists(*([_flat(tensor) for tensor in tensors] for tensors in lists))
    if not rates.decays:
        adam(flat, flat.params, rates.lr, rates)
        return
    lr, weight_decay = float(rates.lr), float(rates.weight_decay)
    # One scratch for all parameters: fresh memory would cost a page fault every 4 kB.
    scratch = flat.params[0].new_empty(max(parameter.numel() for parameter in flat.params))
    for weights, *others in zip(*flat, strict=True):
        updates = scratch[: len(weights)]
        squares: list[Tensor] = []
        for weight, grad, first, second, update in zip(
            *(tensor.split(CHUNK) for tensor in (weights, *others, updates)), strict=True
        ):
            adam(Lists([weight], [grad], [first], [second]), [update.zero_()], -1.0, rates)
            update.add_(weight, alpha=weight_decay)
            squares += [weight.dot(weight), update.dot(update)]
        norms = torch.stack(squares).view(-1, 2).double().sum(0).sqrt_()
        weights.add_(updates, alpha=-lr * float(_trust(norms[0], norms[1])))


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
        if on_cpu(norm) and float(scale) == 1.0:  # reading it waits for nothing here
            return norm
        _torch._foreach_mul_(grads, scale)
    return norm
