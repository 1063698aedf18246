"""Check and time every Triton kernel on a GPU: ``python -m benchmarks.gpu_kernels [--batch 128] [--out DIR]``.

First every kernel is compared with float64, then a step is captured in a CUDA graph and replayed on other data; only
then convolutions are timed against dense cuDNN on whole images and against ``gather``, as replayed graphs (no time of
the host in it), default and tuned. One CSV of ratios and one JSON of what tuning found go to ``results/<device>/``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import PatchGrid, pack, patch_conv2d, patch_conv_transpose2d, patch_max_pool2d, unpack
from patchsparse.backends.triton.tuning import Tuner, tune
from patchsparse.ops_norm import patch_batch_norm_act

from .conftest import COLUMNS, commit, device_name
from .timing import check_parity, in_turn

CALLS = 10  # per graph, so that the start of a replay does not count
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Shape(NamedTuple):
    """A convolution: patch side, input and output channels, kernel, stride, groups."""

    p: int
    c_in: int
    c_out: int
    k: int = 3
    stride: int = 1
    groups: int = 1


SHAPES = (
    *(Shape(p, c, c) for p, c in ((8, 64), (4, 128), (2, 256), (1, 512))),
    *(Shape(p, c, c, stride=2) for p, c in ((8, 128), (4, 256), (2, 512))),
    *(Shape(p, c, c, k=7, groups=c) for p, c in ((8, 128), (4, 256), (2, 512), (1, 1024))),
    Shape(32, 12, 64, k=7, stride=2),
)

Arguments = tuple[Tensor, ...]


def step(run: Callable[..., Tensor], inputs: Arguments) -> list[Tensor]:
    """Return the output of ``run`` and the gradients at the inputs for a fixed direction."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    y = run(*leaves)
    direction = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, direction)]


def operations(grid: PatchGrid, g: torch.Generator) -> Iterator[tuple[str, Callable[..., Tensor], Arguments]]:
    """Yield a name, a function of (backend, tensors) and float32 tensors, for every kind of kernel."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=grid.device)

    n = grid.num_active
    for s in SHAPES:
        weight = normal(s.c_out, s.c_in // s.groups, s.k, s.k) / (s.k * (s.c_in // s.groups) ** 0.5)
        options = (s.stride, s.k // 2, 1, s.groups)
        yield (
            f"conv {s}",
            lambda backend, x, w, b, o=options: patch_conv2d(x, w, b, grid, *o, backend=backend),
            (normal(n, s.c_in, s.p, s.p), weight, normal(s.c_out)),
        )
    yield (
        "transposed conv",
        lambda backend, x, w: patch_conv_transpose2d(x, w, None, grid, 2, 1, backend=backend),
        (normal(n, 64, 4, 4), normal(64, 32, 4, 4) / 32),
    )
    yield (
        "max-pool",
        lambda backend, x: patch_max_pool2d(x, grid, 3, 2, 1, backend=backend),
        (normal(n, 64, 16, 16),),
    )
    yield (
        "batch norm + ReLU + residual",
        lambda backend, x, r, w, b: patch_batch_norm_act(
            x, w, b, None, None, True, activation="relu", residual=r, backend=backend
        ),
        (normal(n, 96, 8, 8), normal(n, 96, 8, 8), normal(96), normal(96)),
    )


def check(device: str) -> None:
    """Raise AssertionError unless every kernel agrees with float64 in every dtype."""
    g = torch.Generator(device).manual_seed(0)
    grid = PatchGrid.random(8, (9, 9), 0.4, generator=g)
    for name, run, inputs in operations(grid, g):
        for dtype, tolerance in TOLERANCE.items():
            rounded = tuple(i.to(dtype) for i in inputs)
            exact = step(lambda *i, r=run: r("gather", *i), tuple(i.double() for i in rounded))
            for what, a, e in zip(
                ["y", "x", "w", "b", "r"], step(lambda *i, r=run: r("triton", *i), rounded), exact, strict=False
            ):
                check_parity(f"{name} {dtype} {what}", a, e, tolerance)
        sys.stdout.write(f"correct  {name}\n")


def check_graph(device: str) -> None:
    """Raise AssertionError unless a captured forward and backward pass replays correctly on other data."""
    g = torch.Generator(device).manual_seed(1)
    grid = PatchGrid.random(8, (9, 9), 0.4, generator=g)
    x = torch.randn(grid.num_active, 64, 2, 2, device=device).bfloat16()
    w = torch.randn(64, 64, 3, 3, device=device).bfloat16()

    def run() -> list[Tensor]:
        return step(lambda x, w: patch_conv2d(x, w, None, grid, 1, 1, backend="triton"), (x, w))

    graph, results = _capture(run)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, eager in zip(results, run(), strict=True):
        check_parity("replayed graph", replayed, eager, 1e-6)
    sys.stdout.write("correct  CUDA graph of forward and backward, replayed on other data\n")


def _capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


class Problem(NamedTuple):
    """One timed convolution, packed and dense, with a direction for the gradients."""

    shape: Shape
    grid: PatchGrid
    x: Tensor
    w: Tensor
    g: Tensor
    dense_x: Tensor
    dense_g: Tensor

    @property
    def options(self) -> tuple[list[int], list[int], list[int], int]:
        s = self.shape
        return [s.stride] * 2, [s.k // 2] * 2, [1, 1], s.groups


def problem(shape: Shape, masked: float, batch: int, dtype: torch.dtype) -> Problem:
    """Return random operands; image sizes are 9 patches of ``p`` pixels."""
    generator = torch.Generator("cuda").manual_seed(0)
    grid = PatchGrid.random(batch, (9, 9), 1 - masked, generator=generator)
    side = 9 * shape.p
    image = torch.randn(batch, shape.c_in, side, side, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    out = torch.randn(batch, shape.c_out, side // shape.stride, side // shape.stride, device="cuda", dtype=dtype)
    out = out.to(memory_format=torch.channels_last)
    w = torch.randn(shape.c_out, shape.c_in // shape.groups, shape.k, shape.k, device="cuda", dtype=dtype)
    w = w.to(memory_format=torch.channels_last)
    return Problem(shape, grid, pack(image, grid), w, pack(out, grid), image, out)


def passes(p: Problem, backend: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Return forward, dgrad and wgrad of one way: an engine's name, or ``"dense"`` for cuDNN on whole images."""
    stride, padding, dilation, groups = p.options

    def backward(wanted: list[bool]) -> list[Tensor]:
        found = torch.ops.aten.convolution_backward(
            p.dense_g, p.dense_x, p.w, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return [t for t in found if t is not None]

    if backend == "dense":
        return {
            "fwd": lambda: [F.conv2d(p.dense_x, p.w, None, stride, padding, dilation, groups)],
            "dgrad": lambda: backward([True, False, False]),
            "wgrad": lambda: backward([False, True, False]),
        }
    op, maps, rest = torch.ops.patchsparse, (p.grid.slot, p.grid.coords), (*p.options, backend)
    kernel = list(p.w.shape[2:])
    return {
        "fwd": lambda: [op.conv2d(p.x, p.w, None, *maps, *rest)],
        "dgrad": lambda: [op.conv2d_dgrad(p.g, p.w, *maps, *rest)],
        "wgrad": lambda: [op.conv2d_wgrad(p.x, p.g, *maps, kernel, *rest)],
    }


def graphed(run: Callable[[], list[Tensor]]) -> Callable[[], None]:
    """Return a function that replays ``CALLS`` runs as one CUDA graph."""
    graph, _ = _capture(lambda: [t for _ in range(CALLS) for t in run()])
    return graph.replay


def gate(p: Problem) -> None:
    """Raise AssertionError unless the packed forward pass equals dense-and-mask."""
    masked = unpack(p.x, p.grid)
    stride, padding, dilation, groups = p.options
    expected = pack(F.conv2d(masked, p.w, None, stride, padding, dilation, groups), p.grid)
    check_parity(str(p.shape), passes(p, "triton")["fwd"]()[0], expected, 2e-2)


def measure(
    shapes: tuple[Shape, ...], masked_shares: tuple[float, ...], batch: int, rounds: int
) -> list[dict[str, object]]:
    """Return one row per shape, masked share, pass and way: its time against dense cuDNN's."""
    rows: list[dict[str, object]] = []
    for shape, masked in product(shapes, masked_shares):
        p = problem(shape, masked, batch, torch.bfloat16)
        gate(p)
        for kind, dense in passes(p, "dense").items():
            runs = {"dense": dense, "gather": passes(p, "gather")[kind], "triton": passes(p, "triton")[kind]}
            ways = {name: graphed(run) for name, run in runs.items() if name != "gather" or shape.p > 2}
            with tune():
                runs["triton"]()
            ways["triton tuned"] = graphed(runs["triton"])
            timing = in_turn(ways, rounds)
            for way in [w for w in ways if w != "dense"]:
                rows.append(_row(p, masked, kind, way, timing))
                r = rows[-1]
                sys.stdout.write(f"{r['case']:60} {way:13} {r['ratio']:6}x dense, {r['value']} ms\n")
                sys.stdout.flush()
    return rows


def _row(p: Problem, masked: float, kind: str, way: str, timing) -> dict[str, object]:
    s, ratio = p.shape, timing.ratio("dense", way)
    case = f"{kind} {s.k}x{s.k} s{s.stride} p{s.p} C{s.c_in}-{s.c_out} g{s.groups} masked {masked:.2f}"
    milliseconds = [f"{timing.median(w) / CALLS * 1e3:.4g}" for w in (way, "dense")]
    spread = (round(r, 3) for r in (ratio.median, ratio.low, ratio.high))
    versions = (device_name(), torch.get_num_threads(), torch.__version__, commit())
    fields = ("gpu_kernels", case, way, "dense", *spread, *milliseconds, "ms", *versions)
    return dict(zip(COLUMNS, fields, strict=True))


def save(rows: list[dict[str, object]], tuner: Tuner, folder: Path) -> None:
    """Write the ratios as CSV and everything tuning measured as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu_kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    tuned = {str(key): [asdict(m) for m in found] for key, found in tuner.found.items()}
    (folder / "gpu_tuned.json").write_text(
        json.dumps({"seconds": tuner.seconds, "found": tuned}, indent=1, default=str)
    )


def main() -> int:
    """Run the checks, then the timings; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each timing")
    parser.add_argument("--masked", type=float, nargs="+", default=[0.6], help="masked shares of the patches")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<device>")
    parser.add_argument("--check-only", action="store_true", help="take no times")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("gpu_kernels needs a CUDA device; on a CPU run pytest tests/kernels/test_triton.py\n")
        return 2
    check("cuda")
    check_graph("cuda")
    if arguments.check_only:
        return 0
    folder = arguments.out or Path(__file__).parent / "results" / device_name().replace(" ", "_")
    rows = measure(SHAPES, tuple(arguments.masked), arguments.batch, arguments.rounds)
    with tune() as tuner:
        save(rows, tuner, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
