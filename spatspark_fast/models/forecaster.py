"""What every model that forecasts has in common, and the simplest of them.

A forecaster maps frames ``(B, in_length, H, W)`` to frames ``(B, out_length, H, W)``, one frame for every 5
minutes, both in data units: mm per 5 min divided by the scale of the data set. It runs on ordinary dense layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatspark_fast.common.errors import UserError

__all__ = ["Forecaster", "Persistence", "check_lengths", "pad_to_multiple"]

LONGEST = 4096  # frames, two weeks


def check_lengths(in_length: int, out_length: int) -> None:
    """Raise UserError unless both count at least one frame, and at most `LONGEST`."""
    for name, value in (("in_length", in_length), ("out_length", out_length)):
        if value < 1:
            raise UserError(f"{name} counts frames of 5 minutes and must be at least 1, got {value}")
        if value > LONGEST:
            raise UserError(f"{name} counts frames of 5 minutes and must be at most {LONGEST}, got {value}")


class Forecaster(nn.Module):
    """Forecast ``out_length`` frames from ``in_length`` frames, a frame being 5 minutes.

    ``multiple``: height and width (pixels) must be multiples of it for ``forward``; `predict` takes any size.
    """

    def __init__(self, in_length: int, out_length: int, multiple: int = 1) -> None:
        super().__init__()
        check_lengths(in_length, out_length)
        self.in_length = in_length
        self.out_length = out_length
        self.multiple = multiple

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``frames`` ``(B, in_length, H, W)`` to ``(B, out_length, H, W)``, both in data units.

        Values may be slightly negative: a loss needs their gradient. `predict` cuts them off.
        """
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, frames: Tensor) -> Tensor:
        """Return a forecast of at least 0, ``(B, out_length, H, W)``, for images of any size.

        Pads with dry pixels to a multiple of ``multiple`` and cuts the border off again. Runs in the mode the
        model is in: call ``eval()`` before.
        """
        height, width = frames.shape[-2:]
        return self(pad_to_multiple(frames, self.multiple)).clamp(min=0)[..., :height, :width]

    def check(self, frames: Tensor) -> None:
        """Raise UserError unless ``frames`` fit the model; says nothing while a graph is traced."""
        if torch.compiler.is_compiling():
            return
        if frames.ndim != 4 or frames.shape[1] != self.in_length:
            need = f"(B, {self.in_length}, H, W)"
            raise UserError(f"frames must be {need} for this model, got {tuple(frames.shape)}")
        if frames.shape[2] % self.multiple or frames.shape[3] % self.multiple:
            raise UserError(
                f"height and width must be multiples of {self.multiple} for this model, got "
                f"{frames.shape[2]} x {frames.shape[3]}: use predict(), or pad_to_multiple()"
            )


class Persistence(Forecaster):
    """Repeat the last frame: the forecast that every other one has to beat."""

    def __init__(self, in_length: int = 12, out_length: int = 12) -> None:
        super().__init__(in_length, out_length)

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``(B, in_length, H, W)`` to ``(B, out_length, H, W)``."""
        self.check(frames)
        return frames[:, -1:].repeat(1, self.out_length, 1, 1)


def pad_to_multiple(frames: Tensor, multiple: int) -> Tensor:
    """Pad ``(..., H, W)`` at the bottom and the right with zeros (dry) to multiples of ``multiple``."""
    below, right = (-side % multiple for side in frames.shape[-2:])
    return F.pad(frames, (0, right, 0, below)) if below or right else frames
