"""How many kernels an operator of PyTorch starts on a GPU: one, but for those that take lists of tensors.

These pack tensors in chunks of 65536 elements, up to 320 chunks and a number of tensors that depends on how many lists
there are (PyTorch's ``MultiTensorApply.cuh``). Lists whose tensors differ in shape, strides or dtype take the slow way,
one kernel for each tensor. Counted from these rules, not seen on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["starts"]

CHUNK, BLOCKS = 65536, 320
TENSORS = (110, 64, 48, 36, 30)  # of one kernel, by the number of lists


def starts(name: str, arguments: Sequence[Any]) -> int:
    """Return the kernels that an operator starts.

    Args:
        name: of the operator, without its overload.
        arguments: its positional arguments.
    """
    lists = [a for a in arguments if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not lists or not name.startswith(("_foreach", "_fused")):
        return 1
    alike = [one for one in lists if len(one) == len(lists[0]) and all(map(_alike, one, lists[0]))]
    if name.startswith("_foreach") and len(alike) < len(lists):
        return len(lists[0])
    return _packed([t.numel() for t in lists[0]], TENSORS[min(len(alike), len(TENSORS)) - 1]) + (
        name == "_foreach_norm"
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype


def _packed(sizes: Sequence[int], most: int) -> int:
    """Return the kernels that take tensors of these sizes, at most ``most`` of them each."""
    kernels = blocks = tensors = 0
    for size in filter(None, sizes):
        chunks = -(-size // CHUNK)
        tensors += 1
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == BLOCKS or (last and tensors == most):
                kernels, blocks, tensors = kernels + 1, 0, 0 if last else 1
    return kernels + (blocks > 0)
