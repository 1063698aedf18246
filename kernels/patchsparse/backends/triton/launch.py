"""A kernel with everything it is started with: what the engine runs, and what tests compile without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "as_rows", "is_interpreted", "processors", "row_major", "rows_like", "takes_large_tiles"]


@dataclass(frozen=True)
class Launch:
    """One start of a kernel.

    Attributes:
        kernel: a ``@triton.jit`` function.
        grid: programs along up to three axes.
        arguments: tensors, ints and None, in the kernel's order.
        constants: its ``tl.constexpr`` arguments by name.
        warps: per program.
        stages: of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Start the kernel on the device of its first argument."""
        device = self.arguments[0].device
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.arguments, **self.constants, **options)
        else:
            self.kernel[self.grid](*self.arguments, **self.constants, **options)


def is_interpreted(kernel: Any) -> bool:
    """Return whether ``TRITON_INTERPRET=1`` was set when the kernel was defined: it then runs on CPU tensors."""
    return not isinstance(kernel, JITFunction)


def takes_large_tiles(device: torch.device) -> bool:
    """Return whether four warps share one product, so that large tiles fit their registers: sm_90 and later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def row_major(slot: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps laid out row by row, as kernels read them; copies only if they are not."""
    return slot.contiguous(), coords.contiguous()


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors to fill; without a GPU a small number, so that work is still split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def as_rows(x: Tensor) -> Tensor:
    """Return ``x`` ``(N, C, ph, pw)`` as a contiguous ``(N, ph, pw, C)``; copies only if not channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def rows_like(x: Tensor, count: int, size: tuple[int, int], channels: int) -> Tensor:
    """Return an uninitialised packed tensor ``(count, channels, *size)`` in channels_last memory."""
    return x.new_empty(count, *size, channels).permute(0, 3, 1, 2)
