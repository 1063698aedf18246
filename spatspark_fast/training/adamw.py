"""PyTorch's AdamW, in a form that a CUDA graph can hold as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spatspark_fast.training.device_rates import Rates, adam, tensors_of

__all__ = ["AdamW"]

_torch: Any = torch  # type checkers do not know its kernels for lists of tensors


class AdamW(torch.optim.AdamW):
    """Take PyTorch's own `step`, or the same step by rates that lie on the device, `advance` and `move`.

    PyTorch's form for graphs takes weight decay as a number, which a graph would keep for ever. The state is PyTorch's.
    """

    def advance(self) -> list[tuple[float, float, float]]:
        """Count the step; return the learning rate, the weight decay and the number of the step of each group.

        Raises ValueError if the parameters have taken different numbers of steps.
        """
        counts = [state["step"] for state in self.state.values()]
        if counts:
            _torch._foreach_add_(counts, 1)
            every = torch.stack(counts)
            if bool((every != every[0]).any()):
                raise ValueError("the parameters have taken different numbers of steps: give --trainer.graph off")
        count = float(counts[0]) if counts else 1.0
        return [(group["lr"], group["weight_decay"], count) for group in self.param_groups]

    @torch.no_grad()
    def move(self, rates: Tensor, decays: Sequence[bool]) -> None:
        """Move the weights by ``rates`` ``(groups, 3)`` float32 on their device, in the order of `advance`.

        ``decays`` says of which groups the weight decay is not 0.
        """
        for group, row, decays_now in zip(self.param_groups, rates, decays, strict=True):
            lists = tensors_of(group["params"], self.state)
            if not lists.params:
                continue
            for parameter in lists.params:
                if "step" not in self.state[parameter]:
                    self.state[parameter]["step"] = torch.tensor(1.0)
            lr, weight_decay, step = row.unbind()
            numbers = Rates.of(group, lr, weight_decay, step, decays_now)
            if numbers.decays:
                _torch._foreach_mul_(lists.params, 1 - numbers.lr * numbers.weight_decay)
            adam(lists, lists.params, numbers.lr, numbers)
