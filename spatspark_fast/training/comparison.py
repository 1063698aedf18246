"""Compare a replayed step with the same step kernel by kernel: its results, and all that it moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["copies", "differences", "numbers", "ways_apart"]

FAR = 0.1  # distance between a replayed and an eager step, as a share of the step, from which on a graph is refused


def copies(state: Mapping[str, Iterable[Tensor]]) -> dict[str, list[Tensor]]:
    """Return copies on the CPU: beside a graph a GPU may have no room for them."""
    return {name: [tensor.to("cpu", copy=True) for tensor in tensors] for name, tensors in state.items()}


def numbers(results: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Read what came of a step."""
    return {name: float(value) for name, value in results.items() if value is not None}


def differences(replayed: Mapping[str, float], own: Mapping[str, float]) -> list[str]:
    """Say which results of a replay are not those of the step kernel by kernel, by more than `FAR` of them."""
    return [
        f"{name} {replayed[name]:.6g} instead of {value:.6g}"
        for name, value in own.items()
        if not abs(replayed[name] - value) <= FAR * abs(value)
    ]


def ways_apart(
    state: Mapping[str, Iterable[Tensor]], before: Mapping[str, list[Tensor]], replayed: Mapping[str, list[Tensor]]
) -> list[str]:
    """Say what a replay moved otherwise than the step kernel by kernel did, by more than `FAR` of its way."""
    found = []
    for name, tensors in state.items():
        apart = moved = 0.0
        for tensor, start, other in zip(tensors, before[name], replayed[name], strict=True):
            own = tensor.to("cpu").double()
            moved += float((own - start).square().sum())
            apart += float((own - other).square().sum())
        if not apart**0.5 <= FAR * moved**0.5:
            found.append(f"{name} by {apart**0.5:.2g} on a way of {moved**0.5:.2g}")
    return found
