"""The dtype that an operation keeps its sums in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sum_dtype", "wide"]


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over ``x`` are kept in: float64 of float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype that sums over it are kept in."""
    return x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()
