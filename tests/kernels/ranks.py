"""Several processes played by threads of one, to test what exchanges small tensors between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """Run a function once for each rank at the same time, with an ``all_gather`` between them.

    Attributes:
        exchanged: what each exchange gave, ``(ranks, K)``, in order.
    """

    def __init__(self, number: int):
        self.number = number
        self.exchanged: list[Tensor] = []
        self._barrier = Barrier(number, timeout=60)
        self._parts: list[Tensor] = [torch.empty(0)] * number

    def run(self, function: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
        """Return ``function(rank, all_gather)`` of every rank."""

        def of(rank: int) -> T:
            def all_gather(part: Tensor) -> Tensor:
                self._parts[rank] = part
                if self._barrier.wait() == 0:
                    self.exchanged.append(torch.stack(self._parts))
                self._barrier.wait()
                return self.exchanged[-1]

            return function(rank, all_gather)

        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(of, range(self.number)))


def replay(exchanged: list[Tensor], rank: int, tolerance: float) -> Callable[[Tensor], Tensor]:
    """Return an ``all_gather`` that gives what was exchanged, after a check of the part that ``rank`` sends."""
    left = iter(exchanged)

    def all_gather(part: Tensor) -> Tensor:
        whole = next(left)
        torch.testing.assert_close(part, whole[rank], rtol=tolerance, atol=tolerance)
        return whole

    return all_gather
