"""Time one convolution: this project's engines, dense cuDNN and the peers, in turn and on the same active patches.

Passes that can be captured are timed as replayed CUDA graphs, without any time of the host. Peers that synchronise with
the host cannot be; they are timed as they are called, and so is this project beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conftest import COLUMNS, commit, device_name
from .convolutions import Problem, reference
from .gpu_checks import capture
from .peers import Packed, Peer, check, passes
from .timing import Timing, check_parity, in_turn

__all__ = ["Case", "Row", "Run", "contenders", "graph_rows", "graphed", "peer_rows", "row"]

CALLS = 10  # per timed run, so that the start of a replay or the wait at its end does not count
LIMIT = 2e-2  # relative error of 16-bit results against float32
Row = dict[str, object]
Run = Callable[[], list[Tensor]]


class Case(NamedTuple):
    """A problem in bfloat16, the masked share it was drawn with, and how often to time it."""

    p: Problem
    masked: float
    rounds: int
    tuned: bool

    def named(self, kind: str) -> str:
        return f"{kind} {self.p.shape} masked {self.masked:.2f}"


@dataclass(frozen=True)
class Contender:
    """A peer on one problem, checked and ready to run: its label, its passes and the peer itself."""

    label: str
    runs: dict[str, Run]
    peer: Peer


def row(case: str, way: str, against: str, timing: Timing) -> Row:
    """Return a line of the table: how many times longer ``against`` takes than ``way``, and milliseconds of a call."""
    ratio = timing.ratio(against, way)
    value, other = (f"{timing.median(w) / CALLS * 1e3:.4g}" for w in (way, against))
    return _row(case, way, against, (ratio.median, ratio.low, ratio.high), value, other, "ms")


def _row(case: str, way: str, against: str, ratios: tuple[float, ...], value: str, other: str, unit: str) -> Row:
    versions = (device_name(), torch.get_num_threads(), torch.__version__, commit())
    fields = ("gpu_kernels", case, way, against, *(round(r, 3) for r in ratios), value, other, unit, *versions)
    sys.stdout.write(f"{case:58} {way:15} {ratios[0]:7.2f}x {against}, {value} {unit}\n")
    sys.stdout.flush()
    return dict(zip(COLUMNS, fields, strict=True))


def operators(p: Problem, backend: str) -> dict[str, Run]:
    """Return the passes of a problem as bare operators: an engine's, or those of ``"dense"`` cuDNN on whole images."""
    stride, padding, dilation, groups = p.options
    if backend == "dense":
        x, g = (_image(t, p) for t in (p.x, p.g))

        def backward(wanted: list[bool]) -> list[Tensor]:
            found = torch.ops.aten.convolution_backward(
                g, x, p.weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
            )
            return [t for t in found if t is not None]

        return {
            "fwd": lambda: [F.conv2d(x, p.weight, None, stride, padding, dilation, groups)],
            "dgrad": lambda: backward([True, False, False]),
            "wgrad": lambda: backward([False, True, False]),
        }
    op, maps, rest = torch.ops.patchsparse, (p.grid.slot, p.grid.coords), (*p.options, backend)
    kernel = list(p.weight.shape[2:])
    return {
        "fwd": lambda: [op.conv2d(p.x, p.weight, None, *maps, *rest)],
        "dgrad": lambda: [op.conv2d_dgrad(p.g, p.weight, *maps, *rest)],
        "wgrad": lambda: [op.conv2d_wgrad(p.x, p.g, *maps, kernel, *rest)],
    }


def _image(packed: Tensor, p: Problem) -> Tensor:
    """Return a whole image of random values of the size that ``packed`` unpacks to: no zeros, which save power."""
    (rows, columns), batch = p.grid.shape, p.grid.batch_size
    size = (batch, packed.shape[1], rows * packed.shape[2], columns * packed.shape[3])
    return torch.randn(size, device=packed.device, dtype=packed.dtype).contiguous(memory_format=torch.channels_last)


def graphed(runs: dict[str, Run], must: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """Return functions that replay ``CALLS`` runs as one CUDA graph; say which, unless they ``must``, cannot be one."""
    replays = {}
    for name, run in runs.items():
        try:
            graph, _ = capture(lambda run=run: [t for _ in range(CALLS) for t in run()])
        except RuntimeError as error:
            if name in must:
                raise
            sys.stdout.write(f"left out  {name} cannot be captured in a CUDA graph: {str(error).splitlines()[0]}\n")
        else:
            replays[name] = graph.replay
    return replays


def _looped(run: Run) -> Callable[[], None]:
    """Return a function that calls ``run`` ``CALLS`` times."""

    def several() -> None:
        for _ in range(CALLS):
            run()

    return several


def ready(case: Case, peers: tuple[Peer, ...], told: set[str]) -> Iterator[Contender]:
    """Yield the peers that can run and whose results agree with dense-and-mask; say once why others are left out."""
    for peer in peers:
        reason = peer.why_not(case.p.shape)
        if reason is None:
            p = case.p.to(next(t for t in peer.dtypes if t != torch.float32))
            label = peer.label(p.x.dtype)
            try:
                layer = peer.build(p)
                errors = check(layer, p, reference(p))
                if max(errors.values()) <= LIMIT:
                    yield Contender(label, passes(layer, p, peer.parts), peer)
                    continue
                reason = f"{label} {p.shape} deviates from dense-and-mask by {errors}; no time is taken"
            except Exception as error:  # whatever a library raises must not cost the other measurements
                reason = f"{label} {p.shape} failed: {type(error).__name__}: {error}"
        if reason not in told:
            told.add(reason)
            sys.stdout.write(f"left out  {reason}\n")


def graph_rows(case: Case, contenders: tuple[Contender, ...]) -> list[Row]:
    """Return rows of replayed CUDA graphs: every way against dense cuDNN, and ours against the peers that allow it."""
    p, rows = case.p, []
    expected = reference(p)
    for kind in ("fwd", "dgrad", "wgrad"):
        runs = {name: operators(p, name)[kind] for name in ("dense", "gather", "triton")}
        name = {"fwd": "y", "dgrad": "x", "wgrad": "w"}[kind]
        check_parity(f"{kind} {p.shape}", runs["triton"]()[0], expected[name], LIMIT)
        ways = graphed(runs, must=("dense", "triton"))
        if case.tuned:
            from patchsparse.backends.triton.tuning import tune

            with tune():
                runs["triton"]()
            ways |= graphed({"triton tuned": runs["triton"]}, must=("triton tuned",))
        timing = in_turn(ways, case.rounds)
        rows += [row(case.named(kind), way, "dense", timing) for way in ways if way != "dense"]
    for kind in ("fwd", "step"):
        runs = {c.label: c.runs[kind] for c in contenders if c.peer.graphs and kind in c.runs}
        ours = contenders[0].label
        ways = graphed(runs, must=(ours,))
        timing = in_turn(ways, case.rounds)
        rows += [row(case.named(f"{kind} graph"), ours, way, timing) for way in ways if way != ours]
    return rows


def peer_rows(case: Case, contenders: tuple[Contender, ...]) -> list[Row]:
    """Return rows of the first contender against each other one, called from Python; with and without their maps."""
    ours, *others = contenders
    rows = []
    for kind in ("fwd", "dgrad", "wgrad", "bwd", "step", "fwd + map", "step + map"):
        able = [c for c in others if kind in c.runs and (c.peer.maps or not kind.endswith("map"))]
        if not able:
            continue
        timing = in_turn({c.label: _looped(c.runs[kind]) for c in (ours, *able)}, case.rounds)
        rows += [row(case.named(f"{kind} eager"), ours.label, c.label, timing) for c in able]
    if case.p.x.is_cuda:
        rows += _peaks(case, contenders)
    return rows


def _peaks(case: Case, contenders: tuple[Contender, ...]) -> list[Row]:
    """Return rows of the bytes that a step takes above what was allocated before."""
    taken = {}
    for c in contenders:
        run = c.runs.get("step") or c.runs["step + map"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        taken[c.label] = (torch.cuda.max_memory_allocated() - before) / 2**20
    ours, *others = taken
    return [
        _row(case.named("peak memory of a step"), ours, other, (taken[other] / max(taken[ours], 1e-9),) * 3,
             f"{taken[ours]:.4g}", f"{taken[other]:.4g}", "MiB")
        for other in others
    ]  # fmt: skip


def contenders(case: Case, ours: Packed, peers: tuple[Peer, ...], told: set[str]) -> tuple[Contender, ...]:
    """Return our own engine, then the peers that are fit to be timed on this case."""
    found = tuple(ready(case, (ours, *peers), told))
    if not found or found[0].peer is not ours:
        raise RuntimeError(f"the {ours.name} engine did not run {case.p.shape}; see the line above")
    return found
