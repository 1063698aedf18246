"""What every way of convolving masked images offers to the benchmark, and how its passes are run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ..subjects.convolutions import Problem, Shape

__all__ = ["Layer", "Peer", "check", "missing", "passes", "to_packed", "to_rows"]

Run = Callable[[], list[Tensor]]


class Layer(ABC):
    """One convolution of a peer, on one grid, in the peer's own layout of features and weights.

    Attributes:
        weight: a leaf that requires a gradient.
        reuses_map: whether the kernel map serves several forward passes; else each builds its own.
    """

    weight: Tensor
    reuses_map: bool = True

    @abstractmethod
    def build_map(self) -> None:
        """Build afresh from the grid all that depends on which patches are active."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Convolve features in the peer's layout with ``weight``."""

    def operand(self, packed: Tensor) -> Tensor:
        """Return packed input ``(N, C_in, p, p)`` in the peer's layout; not timed."""
        return to_rows(packed)

    def direction(self, packed: Tensor) -> Tensor:
        """Return a packed gradient at the output in the peer's layout; not timed."""
        return to_rows(packed)

    @abstractmethod
    def packed(self, y: Tensor) -> Tensor:
        """Return an output in the peer's layout as ``(N, C_out, p, p)``."""

    @abstractmethod
    def packed_input(self, x: Tensor) -> Tensor:
        """Return input features, or their gradient, as ``(N, C_in, p, p)``."""

    @abstractmethod
    def plain_weight(self, weight: Tensor) -> Tensor:
        """Return a weight, or its gradient, as ``(C_out, C_in / groups, k, k)``."""


class Peer(ABC):
    """A library, or a way of using one.

    Attributes:
        name: short, for tables.
        note: what a reader of its times must know.
        dtypes: that it computes in, the one to compare with first.
        maps: whether it builds something from the active patches before it can convolve.
        graphs: whether its forward and backward pass can be captured in a CUDA graph.
        parts: whether it can compute the two gradients of a convolution apart.
    """

    name: str
    note: str = ""
    dtypes: tuple[torch.dtype, ...]
    maps: bool = True
    graphs: bool = False
    parts: bool = True

    @abstractmethod
    def why_not(self, shape: Shape | None = None) -> str | None:
        """Return in a sentence why it cannot run at all, or not this shape; None if it can."""

    @abstractmethod
    def build(self, p: Problem) -> Layer:
        """Return the convolution of a problem in one of ``dtypes``; its kernel map is not built yet."""

    def label(self, dtype: torch.dtype) -> str:
        """Return the name with the type it computes in."""
        return f"{self.name} { ({torch.bfloat16: 'bf16', torch.float16: 'fp16'}.get(dtype, 'fp32')) }"


def missing(module: str, remedy: str) -> str | None:
    """Return why ``module`` cannot be imported, with the remedy; None if it can."""
    if find_spec(module.partition(".")[0]) is None:
        return f"{module.partition('.')[0]} is not installed; {remedy}"
    try:
        import_module(module)
    except Exception as error:  # a broken binary may raise anything, and must not stop the other peers
        return f"{module} cannot be imported ({type(error).__name__}: {error}); {remedy}"
    return None


def to_rows(packed: Tensor) -> Tensor:
    """Return ``(N, C, p, p)`` as ``(N * p * p, C)``: one row per active pixel, patch by patch."""
    return packed.permute(0, 2, 3, 1).reshape(-1, packed.shape[1])


def to_packed(rows: Tensor, p: int) -> Tensor:
    """Return ``(N * p * p, C)`` as ``(N, C, p, p)``."""
    return rows.view(-1, p, p, rows.shape[1]).permute(0, 3, 1, 2)


def passes(layer: Layer, p: Problem, parts: bool = True) -> dict[str, Run]:
    """Return the passes of a layer whose map is built: forward, gradients apart and together, and a whole step.

    The gradients come through autograd; ``dgrad`` and ``wgrad`` are there only if the peer can compute one without the
    other. ``fwd + map`` and ``step + map`` build the kernel map anew.
    """
    x = layer.operand(p.x).detach()
    weight = layer.weight
    free = x.clone().requires_grad_()
    g = layer.direction(p.g)
    if g.shape != (y := layer.forward(free)).shape:
        raise ValueError(f"direction {tuple(g.shape)} must have the shape of the output {tuple(y.shape)}")

    def backward(x: Tensor, *wanted: Tensor) -> Run:
        others = [t for t in (weight,) if all(t is not w for w in wanted)]
        for tensor in others:
            tensor.requires_grad_(False)
        y = layer.forward(x)
        for tensor in others:
            tensor.requires_grad_(True)
        return lambda: list(torch.autograd.grad(y, wanted, g, retain_graph=True))

    def step() -> list[Tensor]:
        y = layer.forward(free)
        return [y, *torch.autograd.grad(y, (free, weight), g)]

    def mapped(run: Run) -> Run:
        def both() -> list[Tensor]:
            layer.build_map()
            return run()

        return both

    forward: Run = lambda: [layer.forward(free)]  # noqa: E731 - one of a family of closures
    runs = {"fwd + map": mapped(forward), "step + map": mapped(step)}
    if layer.reuses_map:
        runs |= {"fwd": forward, "step": step}
    if parts:
        runs |= {"dgrad": backward(free, free), "wgrad": backward(x, weight)}
    return runs | {"bwd": backward(free, free, weight)}


def check(layer: Layer, p: Problem, expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative errors of output and gradients against `benchmarks.subjects.convolutions.reference`."""
    layer.build_map()
    x = layer.operand(p.x).detach().clone().requires_grad_()
    y = layer.forward(x)
    gx, gw = torch.autograd.grad(y, (x, layer.weight), layer.direction(p.g))
    got = {"y": layer.packed(y), "x": layer.packed_input(gx), "w": layer.plain_weight(gw)}
    errors = {}
    for name, value in got.items():
        exact = expected[name].double()
        if value.shape != exact.shape:
            raise ValueError(f"{name} {tuple(value.shape)} must have the shape {tuple(exact.shape)}")
        errors[name] = float((value.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30))
    return errors
