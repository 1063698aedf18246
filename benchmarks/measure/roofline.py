"""The least time that a machine needs: multiply-adds over its matrix rate, bytes over its copy bandwidth.

Both ceilings are measured here, not taken from a data sheet. The work of a layer or of a whole step is counted by
watching the operators that run: every convolution and matrix product, with the bytes of its operands and results, each
once. What lies between them (norms, activations, sums) is left out, as if it were fused into them: no implementation of
*direct* convolution can pass this floor. Algorithms that need fewer products (Winograd's) may.

The roofline model: Williams, Waterman, Patterson 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from patchsparse.backends import tables
from patchsparse.geometry import Stencil
from patchsparse.processor import lacks

from ..subjects.convolutions import SIDES, Problem, count_pairs
from .timing import wait

__all__ = [
    "Ceilings",
    "Layer",
    "Work",
    "ceilings",
    "conv_work",
    "counted",
    "lines",
    "measure_ceilings",
    "optimiser_seconds",
]

aten = torch.ops.aten
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # of one copy: several times the last cache
MATRIX = {"cpu": 1536, "cuda": 8192}  # side of the square product
PACKED = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")  # of the operators of patchsparse


class Work(NamedTuple):
    """Multiply-adds of direct convolution with active pairs alone, and bytes read and written once each."""

    macs: float
    bytes: float

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.macs + other.macs, self.bytes + other.bytes)


class Layer(NamedTuple):
    """One operator that ran: its name, the shapes of its operands, its type and its work."""

    name: str
    shapes: str
    dtype: torch.dtype
    work: Work


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

    def total(self, layers: Sequence[Layer]) -> float:
        """Return the seconds that layers take at least, one after the other."""
        return sum(self.floor(layer.work, layer.dtype) for layer in layers)


def measure_ceilings(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    copy_bytes: int | None = None,
    side: int | None = None,
    rounds: int = 7,
) -> Ceilings:
    """Measure both ceilings of a device: the fastest of some rounds, on random values."""
    size = (copy_bytes or COPY_BYTES[device.type]) // 4
    side = side or MATRIX[device.type]
    source = torch.randn(size, device=device)
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


@cache
def ceilings(device: str) -> Ceilings:
    """Return the ceilings of a device, measured once in a process."""
    return measure_ceilings(torch.device(device))


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


def conv_work(p: Problem, passes: Sequence[str] = SIDES) -> Work:
    """Return the work of some passes of a convolution of packed patches; each has as many products as the others."""
    macs = p.pairs * p.weight.numel() / (p.shape.k**2)
    return Work(macs * len(passes), float(sum(t.nbytes for t in (p.x, p.weight, p.g))) * len(passes))


def counted(run: Callable[[], object]) -> list[Layer]:
    """Run a function and return all convolutions and matrix products in it, those of its backward pass included.

    Of engines of patchsparse the active pairs are counted, of PyTorch's convolutions every tap of every output.
    """
    with _Counter() as counter:
        run()
    return counter.layers


class _Counter(TorchDispatchMode):
    """Note every convolution and matrix product that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        macs = 0.0
        if namespace == "patchsparse" and name in PACKED:
            macs = _packed_macs(name, args, result)
        elif namespace == "aten":
            macs = _dense_macs(func.overloadpacket, args, result)
        if macs:
            self._add(name, args, result, macs)
        return result

    def _add(self, name: str, args: Sequence[Any], result: Any, macs: float) -> None:
        operands = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        results = [r for r in (result if isinstance(result, list | tuple) else [result]) if isinstance(r, Tensor)]
        moved = sum(t.nbytes for t in (*operands, *results))
        shapes = " ".join("x".join(map(str, t.shape)) for t in operands)
        self.layers.append(Layer(name, shapes, operands[0].dtype, Work(macs, float(moved))))


def _packed_macs(name: str, args: Sequence[Any], result: Any) -> float:
    """Count an engine's convolution: pairs of active pixels times the weights of one tap."""
    if name == "conv2d":
        x, weight, _, slot, coords, stride, padding, dilation = args[:8]
        size, kernel, weights = x.shape[2:], weight.shape[2:], weight.numel()
    elif name == "conv2d_dgrad":
        grad, weight, slot, coords, stride, padding, dilation = args[:7]
        size = [pixels * s for pixels, s in zip(grad.shape[2:], stride, strict=True)]
        kernel, weights = weight.shape[2:], weight.numel()
    else:
        x, _, slot, coords, kernel, stride, padding, dilation = args[:8]
        size, weights = x.shape[2:], result.numel()
    stencil = Stencil(_two(kernel), _two(stride), _two(padding), _two(dilation))
    shape = _two(size)
    key = ("benchmarks.pairs", shape, stencil)
    pairs = tables.remember(slot, key, lambda: count_pairs(slot, coords, shape, stencil))
    return pairs * weights / stencil.taps


def _two(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _dense_macs(packet: Any, args: Sequence[Any], result: Any) -> float:
    """Count a convolution of whole images or a product of matrices; 0 for anything else."""
    if packet is aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        pixels = (x if transposed else result).shape[2:].numel()
        return x.shape[0] * pixels * weight.numel()
    if packet is aten.convolution_backward:
        grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        pixels = (x if transposed else grad).shape[2:].numel()
        return x.shape[0] * pixels * weight.numel() * sum(map(bool, wanted[:2]))
    if packet in (aten.mm, aten.bmm):
        return result.numel() * args[0].shape[-1]
    if packet in (aten.addmm, aten.baddbmm):
        return result.numel() * args[1].shape[-1]
    return 0.0


def optimiser_seconds(found: Ceilings, model: nn.Module) -> float:
    """Return the least time of LAMB or AdamW: weight, gradient and two moments are read, all but one written."""
    return 7 * sum(p.nbytes for p in model.parameters()) / found.copy


def lines(found: Ceilings, layers: Sequence[Layer]) -> Iterator[str]:
    """Yield a table of layers: multiply-adds, bytes, the floor and what it is bound by."""
    for layer in layers:
        bound = "products" if layer.work.macs / found.rate[layer.dtype] > layer.work.bytes / found.copy else "bytes"
        yield (
            f"{layer.name:22}{layer.work.macs / 1e9:9.3f} G {layer.work.bytes / 2**20:9.1f} MiB "
            f"{found.floor(layer.work, layer.dtype) * 1e3:9.3f} ms by {bound:8} {layer.shapes}"
        )
