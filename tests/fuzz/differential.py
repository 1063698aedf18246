"""Compare all engines with dense-and-mask in float64, on random right calls: ``python -m tests.fuzz.differential``.

Each call runs on ``cpp`` by every instruction set that the processor has, on ``gather``, ``dense`` and ``auto``: its
result and its gradients. The rule is that of ``tests/kernels/test_cpp.py``: the error is at most twice PyTorch's own in
the same dtype, plus four roundings of the root of the summed squares; in float64 it is 1e-10 of that root. Printed is
how many results each way of computing gave, and the largest error as a share of what the rule allows; 1 would be too
much. Call N is drawn from the number N alone: ``--only N`` makes it again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

import patchsparse
from patchsparse.backends import OVERRIDE
from patchsparse.backends.cpp import library, native
from patchsparse.processor import ISA

from .kernel_calls import KINDS, Call, _Draw

PRODUCTS = ("patch_conv2d", "patch_conv_transpose2d", "image_conv2d", "image_conv_transpose2d", "patch_avg_pool2d")
LAYOUTS = (torch.contiguous_format, torch.channels_last)  # PyTorch's error in float32 is another in each
LEFT = ("cannot run", "batch statistics need more than one value")  # by an engine; by anyone
Results = list[Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if any result broke the rule."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)  # results do not depend on their number, and many processes share a test machine
    found = Found()
    begun = time.monotonic()
    for seed in _seeds(options):
        compare(seed, found)
    minutes = (time.monotonic() - begun) / 60
    sys.stdout.write(
        "\n".join(
            [
                *found.table(),
                f"{found.calls} calls, {found.refused} refused by all, in {minutes:.1f} min",
                *found.broken,
            ]
        )
        + "\n"
    )
    return 1 if found.broken else 0


class Found:
    """Hold what was compared.

    Attributes:
        counts: results by (operation, way of computing).
        worst: the largest error of each as a share of what is allowed.
        broken: a line for each result that broke the rule.
        calls: how many calls were drawn.
        refused: how many of them every engine refused.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.worst: dict[tuple[str, str], float] = defaultdict(float)
        self.broken: list[str] = []
        self.calls = self.refused = 0

    def add(self, operation: str, way: str, share: float, seed: int, what: str) -> None:
        """Count a result, whose error is a ``share`` of what is allowed."""
        self.counts[operation, way] += 1
        self.worst[operation, way] = max(self.worst[operation, way], share)
        if not share <= 1:
            self.broken.append(f"{share:9.3g} of what is allowed: {operation} by {way}, {what}: --only {seed}")

    def table(self) -> list[str]:
        """Return the lines of a table: operations down, ways across, counts with the worst share behind them."""
        ways = sorted({way for _, way in self.counts})
        rows = [["operation", *ways], ["---"] + ["---:"] * len(ways)]
        for operation in sorted({operation for operation, _ in self.counts}):
            keys = [(operation, way) for way in ways]
            cells = [f"{self.counts[key]} ({self.worst[key]:.2f})" if self.counts[key] else "" for key in keys]
            rows.append([operation, *cells])
        rows.append(["all", *(str(sum(n for (_, way), n in self.counts.items() if way == by)) for by in ways)])
        return ["| " + " | ".join(row) + " |" for row in rows]


def compare(seed: int, found: Found) -> None:
    """Draw a call and compare what all engines make of it."""
    call = _call(Random(f"differential {seed}"))
    found.calls += 1
    operation, dtype = call.function.__name__, _dtype(call)
    exact = _reference(call, torch.float64)
    narrow = _wide(dtype) if operation.startswith("patch_batch_norm") else dtype
    by_layout = [_reference(call, narrow, layout) for layout in LAYOUTS]
    own_errors = [
        max(_off(x.to(dtype), right) for x in theirs) for right, *theirs in zip(exact, *by_layout, strict=True)
    ]
    scales = _scales(call, exact) if operation in PRODUCTS else exact
    unit = 1e-10 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    ways = list(_by_every_engine(call, dtype))
    if not ways:
        found.refused += 1
    for way, results in ways:
        for what, ours, right, own, scale in zip(_names(call), results, exact, own_errors, scales, strict=True):
            allowed = 2 * own + unit * float(scale.nan_to_num().norm()) + 1e-300
            ours = ours.double()
            same = (ours == right) | (ours.isnan() & right.isnan())
            error = torch.where(same, 0.0, ours - right)
            found.add(operation, way, float(error.norm()) / allowed, seed, f"{what} in {dtype}")


def _call(random: Random) -> Call:
    """Draw a right call of a public function; half of the convolutions have channels enough for every method."""
    draw = _Draw(random)
    if random.random() < 0.5:
        draw.channels = random.choice((32, 40, 64))
    call = random.choice([kind for kind in KINDS if kind.__name__ != "_operator"])(draw)
    if call.function is patchsparse.patch_conv2d and call.arguments["groups"] == 1 and draw.channels >= 32:
        kernel = call.arguments["weight"].shape[2:]
        call.arguments["weight"] = draw.normal(random.choice((32, 33, 64)), draw.channels, *kernel)
        call.arguments["bias"] = None
    return call


def _by_every_engine(call: Call, dtype: torch.dtype) -> Iterator[tuple[str, Results]]:
    """Yield the name of each way that takes the call, with its result and gradients."""
    if "backend" not in call.arguments:
        yield "no engine", _results(call, call.function, {})
        return
    isas = [isa for isa in library.load().isas if dtype == torch.bfloat16 or native.ISAS.index(isa) < native.BF16]
    ways = [("cpp", isa) for isa in isas] + [("gather", None), ("dense", None), ("auto", None)]
    for backend, isa in ways:
        if isa is not None:
            os.environ[ISA] = isa
        try:
            yield f"{backend} {isa}" if isa else backend, _results(call, call.function, {"backend": backend})
        except (RuntimeError, ValueError) as error:
            if not any(words in str(error) for words in LEFT):
                raise
        finally:
            os.environ.pop(ISA, None)


def _results(call: Call, function: Any, more: dict[str, Any]) -> Results:
    """Return the result of a function and its gradients, towards a direction that depends on the call alone."""
    given = {name: call.arguments[name].detach().requires_grad_() for name in call.differentiable}
    copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in call.arguments.items()}  # statistics move
    result = function(**{**copied, **given, **more})
    return [result.detach(), *_gradients(result, list(given.values()))]


def _off(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).nan_to_num().norm())


def _reference(
    call: Call, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format, squared: bool = False
) -> Results:
    """Return what dense-and-mask in plain PyTorch gives when computed in a dtype; ``squared``: of squared numbers.

    Operands are in a memory ``layout``: PyTorch's own weight gradients are wrong in float64 for some others.
    """

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(dtype).contiguous(memory_format=layout if value.dim() == 4 else torch.contiguous_format)
        return value.square() if squared else value

    arguments = {name: cast(value) for name, value in call.arguments.items()}
    given = {name: arguments[name].detach().requires_grad_() for name in call.differentiable}
    result = call.reference({**arguments, **given}, call.active)
    return [result.detach(), *_gradients(result, list(given.values()), squared)]


def _gradients(result: Tensor, leaves: list[Tensor], squared: bool = False) -> Results:
    if not leaves:
        return []
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    direction = (direction.double().square() if squared else direction).to(result.dtype)
    if not result.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(result, leaves, direction, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def _scales(call: Call, exact: Results) -> Results:
    """Return the root of the summed squares of all products of each number; for sums of squares it is exact."""
    return [square.clamp(min=0).sqrt() for square in _reference(call, torch.float64, squared=True)]


def _names(call: Call) -> list[str]:
    return ["the result", *(f"the gradient at {name}" for name in call.differentiable)]


def _dtype(call: Call) -> torch.dtype:
    return next(call.arguments[name].dtype for name in ("packed", "x", "image") if name in call.arguments)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _seeds(options: argparse.Namespace) -> Iterator[int]:
    if options.only:
        yield from options.only
        return
    end = time.monotonic() + 60 * options.minutes
    for seed in itertools.count(options.seed):
        if time.monotonic() >= end:
            return
        yield seed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.differential", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to draw calls")
    parser.add_argument("--seed", type=int, default=0, help="number of the first call")
    parser.add_argument("--only", type=int, nargs="+", help="draw these calls alone")
    return parser


if __name__ == "__main__":
    os.environ.pop(OVERRIDE, None)
    sys.exit(main())
