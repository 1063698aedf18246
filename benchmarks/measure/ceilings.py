"""The least time that a machine needs: multiply-adds over its matrix rate, bytes over its copy bandwidth.

Both ceilings are measured here, not taken from a data sheet. No implementation of *direct* convolution can pass the
floor that follows. Algorithms that need fewer products (Winograd's) may.

The roofline model: Williams, Waterman, Patterson 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from patchsparse.processor import lacks

from .device import wait
from .scales import Scale
from .work import Counted, Work

__all__ = ["Ceilings", "ceilings", "measure_ceilings", "optimiser_seconds"]


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most.

    Attributes:
        copy: bytes/s of a large copy, read and written bytes counted.
        rate: multiply-adds/s of a large square matrix product, for each type; the faster of ``torch.mm`` and a 1x1
            convolution, since they come from different libraries on a CPU. Where it lacks a half, that of float32.
    """

    device: str
    copy: float
    rate: Mapping[torch.dtype, float]

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """Return the seconds that ``work`` takes at least."""
        return max(work.macs / self.rate[dtype], work.bytes / self.copy)

    def total(self, layers: Sequence[Counted]) -> float:
        """Return the seconds that layers take at least, one after the other."""
        return sum(self.floor(layer.work, layer.dtype) for layer in layers)


def measure_ceilings(
    device: torch.device,
    copy_bytes: int,
    side: int,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    rounds: int = 7,
) -> Ceilings:
    """Measure both ceilings of a device: the fastest of some rounds, on random values.

    Args:
        device: where to measure.
        copy_bytes: size of the copy.
        side: rows and columns of the matrix product.
        dtypes: types of the matrix product.
        rounds: runs of which the fastest counts.
    """
    source = torch.randn(copy_bytes // 4, device=device)
    copy = 2 * source.nbytes / _fastest(partial(torch.empty_like(source).copy_, source), rounds)
    rate: dict[torch.dtype, float] = {}
    for dtype in dtypes:
        if device.type == "cpu" and lacks(dtype):  # float32 does the same work, and faster
            rate[dtype] = rate[torch.float32]
            continue
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        image, weight = a.t()[None, :, None], b[:, :, None, None]  # the same product as a 1x1 convolution
        products = (partial(torch.mm, a, b, out=torch.empty_like(a)), partial(F.conv2d, image, weight))
        rate[dtype] = side**3 / min(_fastest(product, rounds) for product in products)
    return Ceilings(device.type, copy, rate)


def ceilings(scale: Scale) -> Ceilings:
    """Return the ceilings of the device of a scale, measured once in a process."""
    return _measured(scale.device, scale.copy_bytes, scale.matrix_side)


@cache
def _measured(device: torch.device, copy_bytes: int, side: int) -> Ceilings:
    return measure_ceilings(device, copy_bytes, side)


def _fastest(run: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the fastest of some runs, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        wait()
        started = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def optimiser_seconds(found: Ceilings, model: nn.Module) -> float:
    """Return the least time of LAMB or AdamW: weight, gradient and two moments are read, all but one written."""
    return 7 * sum(p.nbytes for p in model.parameters()) / found.copy
