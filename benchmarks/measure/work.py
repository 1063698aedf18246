"""Count the work of what runs: multiply-adds and bytes of every convolution and matrix product.

The operators are watched while they run. Each tensor that one reads or writes counts once. What lies between them
(norms, activations, sums) is left out, as if it were fused into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from patchsparse.backends import tables
from patchsparse.geometry import Stencil

__all__ = ["Counted", "Work", "count_pairs", "counted"]

aten = torch.ops.aten
PACKED = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")  # operators of patchsparse


class Work(NamedTuple):
    """Multiply-adds of direct convolution with active pairs alone, and bytes read and written once each."""

    macs: float
    bytes: float

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.macs + other.macs, self.bytes + other.bytes)


class Counted(NamedTuple):
    """One operator that ran: its name, the shapes of its operands, its type and its work."""

    name: str
    shapes: str
    dtype: torch.dtype
    work: Work


def count_pairs(slot: Tensor, coords: Tensor, size: tuple[int, int], stencil: Stencil) -> int:
    """Count the (active output pixel, active input pixel) pairs of a stencil on patches of ``size`` pixels."""
    return int((tables.tap_rows(slot, coords, size, stencil) >= 0).sum())


def counted(run: Callable[[], object]) -> list[Counted]:
    """Run a function and return all convolutions and matrix products in it, those of its backward pass included.

    The engines of patchsparse count with their active pairs, PyTorch's convolutions with every tap of every output.
    """
    with _Counter() as counter:
        run()
    return counter.layers


class _Counter(TorchDispatchMode):
    """Note every convolution and matrix product that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Counted] = []

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
        self.layers.append(Counted(name, shapes, operands[0].dtype, Work(macs, float(moved))))


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
