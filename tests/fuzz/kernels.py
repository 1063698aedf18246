"""Right and hostile calls of the kernels' public functions, compared with dense PyTorch in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import patchsparse
from patchsparse import PatchGrid

from .damage import NUMBERS, VALUES
from .kernel_calls import ENGINES, TOLERANCES, Call, drawn
from .outcomes import REFUSED, Suite, Verdict, judge_call, wrong

__all__ = ["SUITE"]

LARGE = 64  # no right call of these sizes has a larger number in it


def attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    """Draw a right call; leave it so, or put something hostile in the place of an argument or of a map."""
    call = drawn(random)
    kind = random.choice(("right", "right", "argument", "argument", "argument", "maps", "grid"))
    if kind == "grid":
        return _judged(partial(_make_grid, random))
    if kind == "argument":
        name = random.choice(list(call.arguments))
        usual = call.arguments[name]
        call.arguments[name] = odd = _hostile(random, usual)
        if isinstance(odd, PatchGrid):
            call.active = odd.active
        sparse = isinstance(odd, Tensor) and odd.is_sparse
        left = ANYWHERE if sparse else BY_PYTORCH if _name(call).startswith("image_") else None
        return _judged(partial(_compared, call, name), untyped=not _of_type(odd, usual), left=left)
    if kind == "maps" and _with_hostile_maps(random, call):
        return _judged(
            partial(_compared, call, "maps"),
            untyped=call.arguments.get("slot", 0) is None or call.arguments.get("coords", 0) is None,
        )
    return _judged(partial(_compared_with_gradients, call))


def _of_type(value: Any, usual: Any) -> bool:
    """Tell whether a value is of the Python type that an argument is annotated with."""
    if isinstance(usual, int | tuple) and not isinstance(usual, bool):
        return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(side, int) for side in value))
    kinds = {Tensor: Tensor, type(None): (Tensor, type(None)), bool: bool, float: (float, int)}
    return isinstance(value, next((kind for usually, kind in kinds.items() if isinstance(usual, usually)), type(usual)))


def _judged(function: Callable[[], Verdict | None], untyped: bool = False, left: str | None = None) -> Verdict:
    """Judge a call.

    What is no sentence of ours, and refuses all the same: PyTorch's answer where the schema of an operator does not
    fit, memory is short, a number is beyond the dtype, or the call is ``left`` to it; and Python's own TypeError and
    AttributeError where the annotation is broken (``untyped``).
    """
    verdict = judge_call(function)
    if verdict.outcome != "traceback":
        return verdict
    refused = untyped and verdict.what.startswith(("AttributeError", "TypeError"))
    refused |= left is not None and re.match(left, verdict.what) is not None
    refused |= any(words in verdict.what for words in REFUSALS_OF_PYTORCH)
    return REFUSED if refused else verdict


ANYWHERE = r"(RuntimeError|NotImplementedError) "  # of a sparse tensor
BY_PYTORCH = r"RuntimeError at patchsparse/backends/gather/local\.py"  # whole images
REFUSALS_OF_PYTORCH = (
    "patchsparse::",
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflow",
    "without overflow",
    "a leaf Variable that requires grad",
)
FREE = ("eps", "momentum", "slope", "fill", "training", "count_include_pad", "ceil_mode", "divisor_override")


def _compared(call: Call, changed: str) -> Verdict | None:
    """Call with a hostile argument: the function refuses, or gives what dense PyTorch gives."""
    value = call.arguments.get(changed)
    expected = _expected(call) if changed in (*FREE, "maps") or _sane(value) else None
    result = call.function(**call.arguments)
    name = _name(call)
    if isinstance(value, Tensor) and isinstance(result, Tensor) and value.is_meta and result.is_meta:
        return None  # asked for a shape
    if isinstance(result, Tensor) and not (result.numel() and call.active.any()):
        return None  # there is nothing to compute
    if expected is None:
        return wrong(f"{name} takes {changed} of {_kind(value)}, which has no right answer")
    return _differing(result, expected, call, f"{name} with another {changed}")


def _compared_with_gradients(call: Call) -> Verdict | None:
    """Make a right call, and one step of its gradient."""
    expected = _expected(call)
    name = _name(call)
    if expected is None:
        call.function(**call.arguments)
        return wrong(f"{name} takes what dense PyTorch refuses")
    if not call.differentiable:
        return _differing(call.function(**call.arguments), expected, call, name)
    given = {n: call.arguments[n].detach().requires_grad_() for n in call.differentiable}
    result = call.function(**call.arguments | given)
    exact = {n: call.arguments[n].detach().double().requires_grad_() for n in call.differentiable}
    wanted = call.reference(_exact(call.arguments) | exact, call.active)
    towards = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    verdict = _differing(result.detach(), expected, call, name)
    if verdict is not None or not result.requires_grad or not wanted.numel():
        return verdict
    ours = torch.autograd.grad(result, list(given.values()), towards.to(result.dtype), allow_unused=True)
    theirs = torch.autograd.grad(wanted, list(exact.values()), towards.to(result.dtype).double(), allow_unused=True)
    for argument, our, their in zip(given, ours, theirs, strict=True):
        verdict = our is not None and their is not None and _differing(our, their, call, f"{name}, grad of {argument}")
        if verdict:
            return verdict
    return None


def _name(call: Call) -> str:
    return getattr(call.function, "__name__", "").replace("<lambda>", "an operator") or str(call.function)


def _expected(call: Call) -> Tensor | None:
    """Return what dense PyTorch gives in float64, or None if it refuses."""
    try:
        with torch.no_grad():
            return call.reference(_exact(call.arguments), call.active)
    except Exception:  # any refusal of PyTorch's is one
        return None


def _exact(arguments: dict[str, Any]) -> dict[str, Any]:
    def exact(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta or value.is_sparse or value.numel() > 10**6:
            raise TypeError("no tensor of numbers that fits a right call")
        if value.dtype not in TOLERANCES and "weight" in arguments and value is not arguments.get("residual"):
            raise TypeError("no numbers that can be convolved")
        return value if value.is_complex() else value.double()

    return {name: value if name in ("slot", "coords") else exact(value) for name, value in arguments.items()}


def _sane(value: Any) -> bool:
    """Tell whether dense PyTorch can be asked what comes of a value without trying its own limits."""
    if isinstance(value, tuple | list):
        return all(map(_sane, value))
    if isinstance(value, int | float | np.integer):
        return bool(abs(value) <= LARGE)
    if isinstance(value, str):
        return value in (*ENGINES, "identity", "relu", "leaky_relu", "silu")
    return value is None or isinstance(value, Tensor | PatchGrid)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} on {value.device.type}"
    return f"{type(value).__name__} {value!r}"[:60]


def _differing(result: Any, expected: Tensor, call: Call, name: str) -> Verdict | None:
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return wrong(f"{name}: another shape")
    if result.is_meta:
        return wrong(f"{name}: a result without values")
    if not result.numel():
        return None
    dtypes = [value.dtype for value in call.arguments.values() if isinstance(value, Tensor)]
    tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in [*dtypes, result.dtype])
    finite = expected[torch.isfinite(expected)].abs()
    scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    ours = result if result.is_complex() else result.double()
    if torch.allclose(ours, expected.to(ours.dtype), rtol=0.0, atol=tolerance * scale, equal_nan=True):
        return None
    return wrong(f"{name}: wrong numbers")


def _hostile(random: Random, value: Any) -> Any:
    """Return something that may stand in no place of this kind."""
    if isinstance(value, Tensor) and random.random() < 0.85:
        return random.choice(ODD_TENSORS)(value)
    if isinstance(value, PatchGrid) and random.random() < 0.7:
        shape = (random.randrange(3), random.randrange(1, 4), random.randrange(1, 4))
        return PatchGrid.from_active(torch.rand(shape) < 0.5)
    if isinstance(value, bool):
        return random.choice((not value, 0, 1, 2, None, "x"))
    if isinstance(value, str):
        return random.choice(("", "Auto", "cuda", "no such", None, 1, "relu", "triton", "minkowski", "cpp"))
    if isinstance(value, float):
        return random.choice((0.0, -1.0, -1e-5, float("nan"), float("inf"), 1e300, None, "x", 1))
    number = random.choice((*NUMBERS, *(0, 1, 2, 3, -1, 5, 2**40, True)))
    if isinstance(value, int | tuple) and random.random() < 0.7:
        ways = [number, (number, 1), (1, number), [number, number], (1,), (1, 1, 1), np.int64(2)]
        return random.choice(ways)
    return random.choice(VALUES)


ODD_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.bfloat16(),
    lambda x: x.long(),
    lambda x: x.bool(),
    lambda x: x.to(torch.complex64),
    lambda x: x.to("meta"),
    lambda x: x.to_sparse() if x.dim() else x,
    lambda x: x[:0],
    lambda x: x[..., :0],
    lambda x: x[None],
    lambda x: x.flatten(),
    lambda x: x[..., :-1],
    lambda x: torch.cat((x, x)) if x.dim() else x,
    lambda x: torch.cat((x, x), 1) if x.dim() > 1 else x,
    lambda x: x[:, :0] if x.dim() > 1 else x,
    lambda x: x[:, :1].expand(-1, 2**40, *x.shape[2:]) if x.dim() > 1 else x,
    lambda x: torch.empty(0),
    lambda x: x.numpy() if x.dtype != torch.bfloat16 else None,
    lambda x: x.tolist(),
    lambda x: None,
    lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
    lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x,
    lambda x: x.transpose(-1, -2) if x.dim() > 1 else x,
    lambda x: x.roll(1, 0) if x.dim() else x,
]


def _with_hostile_maps(random: Random, call: Call) -> bool:
    """Put maps that do not fit into a call, if it has any."""
    holder = call.arguments.get("grid")
    slot, coords = (holder.slot, holder.coords) if holder else map(call.arguments.get, ("slot", "coords"))
    if not isinstance(slot, Tensor) or not isinstance(coords, Tensor):
        return False
    slot, coords = slot.clone(), coords.clone()
    if random.random() < 0.5:
        slot = random.choice(ODD_MAPS)(random, slot)
    else:
        coords = random.choice(ODD_MAPS)(random, coords)
    call.arguments |= {"slot": slot, "coords": coords}
    if holder:
        del call.arguments["slot"], call.arguments["coords"]
        function, active = call.function, holder.active
        call.function = _with_grid(function, active, slot, coords)
    return True


def _with_grid(function: Callable[..., Any], active: Tensor, slot: Any, coords: Any) -> Callable[..., Any]:
    """Return the function with its grid made within the call, where bad maps are refused at the latest."""

    def called(grid: PatchGrid, **rest: Any) -> Any:
        return function(grid=PatchGrid(active, coords, slot), **rest)

    called.__name__ = function.__name__
    return called


def _one_changed(random: Random, x: Tensor) -> Tensor:
    """Return a map with a number that is not its own, near its range or far out of it."""
    if x.numel():
        place = tuple(random.randrange(side) for side in x.shape)
        x[place] = random.choice((0, -1, -2, 1, 2, 3, 7, 99, 10**6, 2**31 - 1, -(2**31)))
    return x


ODD_MAPS: list[Callable[[Random, Tensor], Any]] = [
    *(_one_changed, _one_changed, _one_changed, _one_changed),
    lambda random, x: x.long(),
    lambda random, x: x.short(),
    lambda random, x: x.float(),
    lambda random, x: x.to("meta"),
    lambda random, x: x[:-1],
    lambda random, x: x[..., :-1],
    lambda random, x: x.flatten(),
    lambda random, x: torch.cat((x, x)),
    lambda random, x: x.flip(0),
    lambda random, x: torch.stack((x, x), -1)[..., 0],
    lambda random, x: torch.full_like(x, 2**30),
    lambda random, x: x[:0],
    lambda random, x: None,
]


def _make_grid(random: Random) -> Verdict | None:
    """Make a grid of hostile arguments; one that is made is sound."""
    shape = tuple(random.choice((0, 1, 2, 3, -1, 2**40)) for _ in range(random.choice((2, 3, 3, 3, 4))))
    small = [side if 0 <= side < 9 else 4 for side in shape]
    scores = torch.rand(small)
    if random.random() < 0.3 and scores.numel():
        scores.view(-1)[0] = random.choice((float("nan"), float("inf"), -float("inf")))
    keep: Any = random.choice((0.5, 0.0, 1.0, 1, 2, *NUMBERS, None, "x", True, np.float64(0.5), np.int32(1)))
    nan = bool(torch.isnan(scores).any())
    match random.randrange(4):
        case 0:
            grid = PatchGrid.random(random.choice((0, 1, 3, -1)), shape[:2], keep)  # pyright: ignore
        case 1:
            grid = PatchGrid.from_scores(scores, keep)
            if nan:
                return wrong("from_scores takes NaN")
        case 2:
            active = scores > 0.5
            grid = PatchGrid.from_active(active)
            before = grid.active.clone()
            active.logical_not_()
            if not torch.equal(grid.active, before):
                return wrong("from_active shares memory with its argument")
        case _:
            active: Any = scores > 0.5
            odd: Any = random.choice((active, active.long(), scores, active.tolist(), None))
            grid = PatchGrid.from_active(odd)
    return _sound(grid.complement() if random.random() < 0.3 else grid)


def _sound(grid: PatchGrid) -> Verdict | None:
    rows = torch.arange(grid.num_active, dtype=torch.int32)
    places = grid.coords.long()
    right = torch.equal(grid.slot >= 0, grid.active) and torch.equal(grid.slot[tuple(places.T)], rows)
    image = torch.rand(grid.batch_size, 1, 2 * grid.shape[0], 2 * grid.shape[1])
    back = patchsparse.unpack(patchsparse.pack(image, grid), grid)
    seen = grid.pixels(image.shape[2:])[:, None]
    return None if right and torch.equal(back, image * seen) else wrong("a grid whose maps disagree")


SUITE = Suite(lambda folder: None, attempt)
