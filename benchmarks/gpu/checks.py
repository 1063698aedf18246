"""Compare every Triton kernel with float64 on a GPU, and replay captured steps on other data; no times.

A result may be off from float64 by twice what PyTorch's own is in the same mode, and two roundings of float32: the rule
of the tests. PyTorch's own convolution is that of whole images with zeros where patches are inactive. Modes are the
halves, float32 as PyTorch runs it there (TF32), and exact float32. What misses it is noted, and has no figures;
everything else goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import (
    PatchGrid,
    pack,
    patch_batch_norm_act,
    patch_batch_norm_unpack,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
    unpack,
)
from patchsparse.precision import exact_float32

from ..measure.device import capture
from ..measure.machine import provenance
from ..subjects.convolutions import GROUPS, Shape

__all__ = ["MODES", "NORM_UNPACK", "Checked", "check", "check_graphs", "keep", "missed", "name_of"]

ROUNDING = torch.finfo(torch.float32).eps
NORM_UNPACK = "batch norm + unpack + token"
# Each mode: the dtype, and what is set while it runs.
MODES: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[None]]]] = {
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
    "float32": (torch.float32, nullcontext),
    "exact float32": (torch.float32, exact_float32),
}
Arguments = tuple[Tensor, ...]


class Operation(NamedTuple):
    """One kind of kernel: its name, a function of (backend, tensors), float32 tensors, and PyTorch's own of tensors.

    ``own`` is None where ``gather`` is that.
    """

    name: str
    run: Callable[..., Tensor]
    inputs: Arguments
    own: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Checked:
    """One comparison: of what, in which mode, its error and the most that it may be, or why there is none."""

    name: str
    mode: str
    error: float
    allowed: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the kernel is right; NaN is not."""
        return not self.reason and self.error <= self.allowed

    def __str__(self) -> str:
        if self.reason:
            return f"FAILED   {self.name}, {self.mode}: {self.reason}"
        verdict = "correct " if self.passed else "WRONG   "
        return f"{verdict} {self.name}, {self.mode}: off by {self.error:.1e}, at most {self.allowed:.1e}"


def name_of(shape: Shape) -> str:
    """Return the name under which a convolution is checked."""
    return f"conv {shape}"


def direction_of(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a random direction for the gradients of ``y``, in values that ``dtype`` has."""
    g = torch.Generator(y.device).manual_seed(2)
    return torch.randn(y.shape, generator=g, device=y.device).to(dtype).to(y.dtype)


def step(run: Callable[..., Tensor], inputs: Arguments, direction: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the output of ``run`` and the gradients at the inputs along the ``direction`` of that output."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, direction(y))]


def operations(grid: PatchGrid, g: torch.Generator) -> Iterator[Operation]:
    """Yield every kind of kernel."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=grid.device)

    n = grid.num_active
    for s in (shape for group in GROUPS.values() for shape in group):
        weight = normal(s.c_out, s.c_in // s.groups, s.k, s.k) / (s.k * (s.c_in // s.groups) ** 0.5)
        options = (s.stride, s.k // 2, 1, s.groups)
        yield Operation(
            name_of(s),
            lambda backend, x, w, b, o=options: patch_conv2d(x, w, b, grid, *o, backend=backend),
            (normal(n, s.c_in, s.p, s.p), weight, normal(s.c_out)),
            lambda x, w, b, o=options: pack(F.conv2d(unpack(x, grid), w, b, *o), grid),
        )
    yield Operation(
        "transposed conv",
        lambda backend, x, w: patch_conv_transpose2d(x, w, None, grid, 2, 1, backend=backend),
        (normal(n, 64, 4, 4), normal(64, 32, 4, 4) / 32),
        lambda x, w: pack(F.conv_transpose2d(unpack(x, grid), w, None, 2, 1), grid),
    )
    yield Operation(
        "max-pool",
        lambda backend, x: patch_max_pool2d(x, grid, 3, 2, 1, backend=backend),
        (normal(n, 64, 16, 16),),
    )
    yield Operation(
        "batch norm + ReLU + residual",
        lambda backend, x, r, w, b: patch_batch_norm_act(
            x, w, b, None, None, True, activation="relu", residual=r, backend=backend
        ),
        (normal(n, 96, 8, 8), normal(n, 96, 8, 8), normal(96), normal(96)),
    )
    yield Operation(
        NORM_UNPACK,
        lambda backend, x, w, b, t: patch_batch_norm_unpack(x, grid, w, b, None, None, t, backend=backend),
        (normal(n, 96, 8, 8), normal(96), normal(96), normal(96)),
    )


def off(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return the error of each result, relative to the norm of the exact one."""
    return [
        float((a.double() - e).norm() / e.norm().clamp_min(1e-30)) if a.shape == e.shape else float("nan")
        for a, e in zip(actual, exact, strict=True)
    ]


def compared(what: Operation, mode: str, ours: str) -> Checked:
    """Compare output and gradients of one operation in one mode; what it raises is the reason why there is no error."""
    dtype, context = MODES[mode]
    run, own = what.run, what.own or partial(what.run, "gather")
    along, rounded = partial(direction_of, dtype=dtype), tuple(i.to(dtype) for i in what.inputs)
    try:
        exact = step(partial(run, "gather"), tuple(i.double() for i in rounded), along)
        with context():
            errors = off(step(partial(run, ours), rounded, along), exact)
            others = off(step(own, rounded, along), exact)
    except Exception as error:  # a kernel that fails to compile must not cost the others
        return Checked(what.name, mode, float("nan"), float("nan"), f"{type(error).__name__}: {str(error)[:300]}")
    pairs = [(error, 2 * (other + ROUNDING)) for error, other in zip(errors, others, strict=True)]
    return Checked(what.name, mode, *max(pairs, key=_over))


def _over(pair: tuple[float, float]) -> float:
    """Return how far an error is over what it may be; NaN is over everything."""
    error, allowed = pair
    return error / allowed if error == error else float("inf")


def check(device: str, modes: Iterable[str] = MODES, ours: str = "triton") -> Iterator[Checked]:
    """Yield how every kernel compares with float64, all in the first mode, then in the second; print it."""
    for mode in modes:
        g = torch.Generator(device).manual_seed(0)
        grid = PatchGrid.random(8, (9, 9), 0.4, generator=g)
        for what in operations(grid, g):
            yield _said(compared(what, mode, ours))


def check_graphs(device: str, ours: str = "triton") -> Iterator[Checked]:
    """Yield whether captured forward and backward passes replay correctly on other data, and print it."""
    g = torch.Generator(device).manual_seed(1)
    grid = PatchGrid.random(8, (9, 9), 0.4, generator=g)
    x = torch.randn(grid.num_active, 64, 2, 2, device=device).bfloat16()
    w = torch.randn(64, 64, 3, 3, device=device).bfloat16()
    token = torch.randn(64, device=device)
    drawn: dict[torch.Size, Tensor] = {}  # in the runs before a capture, which lets no generator of its own draw

    def along(y: Tensor) -> Tensor:
        if y.shape not in drawn:
            drawn[y.shape] = direction_of(y, y.dtype)
        return drawn[y.shape]

    def convolved() -> list[Tensor]:
        return step(lambda x, w: patch_conv2d(x, w, None, grid, 1, 1, backend=ours), (x, w), along)

    def densified() -> list[Tensor]:
        run = lambda x, t: patch_batch_norm_unpack(x, grid, None, None, None, None, t, backend=ours)  # noqa: E731
        return step(run, (x, token), along)

    for name, run in (("convolution", convolved), ("batch norm + unpack", densified)):
        name = f"replayed {name}"
        try:
            replay, results = capture(run)
            x.copy_(torch.randn_like(x))
            replay()
            yield _said(Checked(name, "bfloat16", max(off(results, [r.double() for r in run()])), 1e-6))
        except RuntimeError as error:
            yield _said(Checked(name, "bfloat16", float("nan"), 1e-6, str(error)[:300]))


def _said(checked: Checked) -> Checked:
    sys.stdout.write(f"{checked}\n")
    sys.stdout.flush()
    return checked


def keep(found: Iterable[Checked], folder: Path) -> bool:
    """Write the comparisons to ``folder/checks.json`` one by one; return whether all passed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, fresh = folder / "checks.json", folder / "checks.json.new"
    before = json.loads(path.read_text())["checks"] if path.exists() else []
    checks = {(c["name"], c["mode"]): c for c in before}
    right = True
    for checked in found:
        right &= checked.passed
        checks[checked.name, checked.mode] = asdict(checked) | {"passed": checked.passed}
        fresh.write_text(json.dumps({"origin": provenance(), "checks": list(checks.values())}, indent=1))
        fresh.replace(path)
    return right


def missed(folder: Path, mode: str) -> dict[str, str]:
    """Return the kernels whose last check in a mode they did not pass, and by how much."""
    path = folder / "checks.json"
    found = json.loads(path.read_text())["checks"] if path.exists() else []
    return {
        c["name"]: c["reason"] or f"off from float64 by {c['error']:.1e} in {c['mode']}, at most {c['allowed']:.1e}"
        for c in found
        if not c["passed"] and c["mode"] == mode
    }
