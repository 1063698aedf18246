"""Time one convolution on a GPU as replayed CUDA graphs, without any time of the host.

This project's engines, dense cuDNN on whole images and those peers whose passes can be captured, in turn and on the
same active patches. Peers that synchronise with the host cannot be; `benchmarks.peers.contenders` times them as
they are called, and this project beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..measure.rows import Row
from ..measure.timing import check_parity, in_turn
from ..peers.contenders import Case, Contender, row
from ..subjects.convolutions import RESULTS, SIDES, Run, operators, reference

__all__ = ["CALLS", "capture", "graph_rows", "graphed"]

CALLS = 10  # of one timed replay
LIMIT = 2e-2  # relative error of 16-bit results against float32


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Return ``run`` as a CUDA graph, and the tensors that its replays write."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def graphed(runs: dict[str, Run], must: tuple[str, ...], calls: int = CALLS) -> dict[str, Callable[[], None]]:
    """Return functions that replay ``calls`` runs as one CUDA graph; say which, unless they ``must``, cannot be one."""
    replays = {}
    for name, run in runs.items():
        try:
            graph, _ = capture(lambda run=run: [t for _ in range(calls) for t in run()])
        except RuntimeError as error:
            if name in must:
                raise
            sys.stdout.write(f"left out  {name} cannot be captured in a CUDA graph: {str(error).splitlines()[0]}\n")
        else:
            replays[name] = graph.replay
    return replays


def graph_rows(case: Case, contenders: tuple[Contender, ...]) -> list[Row]:
    """Return rows of replayed CUDA graphs: every way against dense cuDNN, and ours against the peers that allow it."""
    p, rows = case.p, []
    expected = reference(p)
    for kind in SIDES:
        runs = {name: operators(p, name)[kind] for name in ("dense", "gather", "triton")}
        check_parity(f"{kind} {p.shape}", runs["triton"]()[0], expected[RESULTS[kind]], LIMIT)
        ways = graphed(runs, ("dense", "triton"), case.calls)
        if case.tuned:
            from patchsparse.backends.triton.tuning import tune

            with tune():
                tuned = runs["triton"]()
                check_parity(f"{kind} {p.shape} tuned", tuned[0], expected[RESULTS[kind]], LIMIT)
            ways |= graphed({"triton tuned": runs["triton"]}, ("triton tuned",), case.calls)
        timing = in_turn(ways, case.rounds)
        rows += [row(case, kind, way, "dense", timing) for way in ways if way != "dense"]
    for kind in ("fwd", "step"):
        runs = {c.label: c.runs[kind] for c in contenders if c.peer.graphs and kind in c.runs}
        ours = contenders[0].label
        ways = graphed(runs, (ours,), case.calls)
        timing = in_turn(ways, case.rounds)
        rows += [row(case, f"{kind} graph", ours, way, timing) for way in ways if way != ours]
    return rows
