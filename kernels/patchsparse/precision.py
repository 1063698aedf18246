"""The dtype that an operation keeps its sums in, and exact float32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["exact_float32", "sum_dtype", "wide"]


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over ``x`` are kept in: float64 of float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype that sums over it are kept in."""
    return x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch TF32 off on a GPU, so that float32 is exact: for comparing, not for timing.

    cuDNN does not search for its fastest kernels meanwhile, which takes it minutes for a model.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark, torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before[:2]
        torch.set_float32_matmul_precision(before[2])
