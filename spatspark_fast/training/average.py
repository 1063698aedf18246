"""An exponential moving average of a model that knows whether it has begun without asking a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["MovingAverage", "averaged"]


class MovingAverage(AveragedModel):
    """Average weights and buffers with a ``decay``; the numbers and the state are those of `AveragedModel`.

    That one reads from the device in each step how many steps there were.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.requires_grad_(False)
        self._begun = False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards ``model``; the first time take its values."""
        if not self._begun and not bool(self.n_averaged > 0):  # a loaded average has begun
            super().update_parameters(model)
            self._begun = True
            return
        self._begun = True
        own, theirs = _values(self.module), _values(model)
        for dtype in dict.fromkeys(value.dtype for value in own):
            pairs = [pair for pair in zip(own, theirs, strict=True) if pair[0].dtype == dtype]
            ours, news = ([pair[side] for pair in pairs] for side in (0, 1))
            self.multi_avg_fn(ours, news, self.n_averaged)  # type: ignore[misc]
        self.n_averaged.add_(1)


def _values(model: nn.Module) -> Sequence[Tensor]:
    return [value.detach() for value in (*model.parameters(), *model.buffers())]


def averaged(model: nn.Module, decay: float) -> MovingAverage | None:
    """Return an exponential moving average of the weights and buffers of a model; None for decay 0."""
    return None if decay <= 0 else MovingAverage(model, decay)
