"""Time one convolution on a GPU as replayed CUDA graphs, without any time of the host.

This project's engines and dense cuDNN on whole images, in turn and on the same active patches. All take their operands
from several sets in turn, so that none finds them in the L2 cache where a network would not. Peers that synchronise
with the host cannot be captured; `benchmarks.peers.contenders` times them as they are called, and this project beside
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice

from torch import Tensor

from ..measure.device import capture, wait
from ..measure.rows import Row, left_out
from ..measure.timing import Timing, calls_to_fill, check_parity, in_turn
from ..peers.contenders import Case, Contender, row, say
from ..subjects.convolutions import RESULTS, SIDES, Problem, Run, operators, reference

__all__ = ["CALLS", "graph_rows", "graphed", "peer_graph_rows"]

CALLS = 12  # of one replay: each of the sets three times
SETS = 4  # of operands
LIMIT = 2e-2  # relative error of 16-bit results against float32
TUNED = "triton tuned"


def graphed(
    ways: Mapping[str, Sequence[Run]], calls: int = CALLS
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Return functions that replay ``calls`` runs as one CUDA graph, and why the other ways cannot be captured.

    Args:
        ways: runs of each way, all of the same work; they take turns.
        calls: runs of a replay.
    """
    replays, gone = {}, {}
    for name, runs in ways.items():

        def several(runs: Sequence[Run] = runs) -> list[Tensor]:
            return [t for run in islice(cycle(runs), calls) for t in run()]

        try:
            replays[name], _ = capture(several)
        except RuntimeError as error:
            gone[name] = f"cannot be captured in a CUDA graph: {error}"
    return replays, gone


def calls_of(ways: Mapping[str, Sequence[Run]], most: int = CALLS) -> int:
    """Return how many runs one replay has: ``most``, but fewer of ways that take long."""
    return min([most, *(calls_to_fill(_seconds(runs[0])) for runs in ways.values())])


def _seconds(run: Run) -> float:
    """Return the seconds of a run, after one that does not count."""
    run()
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def graph_rows(case: Case) -> Iterator[Row]:
    """Yield rows of every way against dense cuDNN, each pass and all of them, default and tuned."""
    sets = [case.p, *(case.p.again(seed) for seed in range(1, SETS))]
    expected = reference(case.p)
    replays: dict[str, Callable[[], None]] = {}
    for names in (("dense", "gather", "triton"), (TUNED,) if case.tuned else ()):  # what is tuned serves all after it
        ways = {f"{name} {side}": runs for name in names for side, runs in _checked(case, name, sets, expected).items()}
        if not replays:
            case = case._replace(calls=calls_of(ways, case.calls))
        captured, gone = graphed(ways, case.calls)
        replays |= captured
        yield from _left_out(case, gone)
    yield from _rows(case, in_turn(replays, case.rounds))


def _left_out(case: Case, gone: Mapping[str, str]) -> Iterator[Row]:
    """Yield what could not be captured; keys end with the pass."""
    for name, reason in gone.items():
        way, kind = name.rsplit(" ", 1)
        yield say(left_out(case.named(kind), way, reason, case.masked))


def _checked(case: Case, name: str, sets: Sequence[Problem], expected: Mapping[str, Tensor]) -> dict[str, list[Run]]:
    """Return the passes of a way on all sets, after those of ours were compared on the first."""
    found: dict[str, list[Run]] = {side: [] for side in SIDES}
    for p in sets:
        for side, run in operators(p, name.split(" ")[0]).items():
            found[side].append(_tuned(run) if name == TUNED else run)
    for side in SIDES if name != "dense" else ():
        check_parity(f"{name} {side} {case.p.shape}", found[side][0]()[0], expected[RESULTS[side]], LIMIT)
    return found


def _tuned(run: Run) -> Run:
    """Return a run that measures configurations where it meets a new kind of call, and takes the best."""

    def within() -> list[Tensor]:
        from patchsparse.backends.triton.tuning import tune

        with tune():
            return run()

    return within


def _rows(case: Case, timing: Timing) -> Iterator[Row]:
    """Yield the rows of each pass, and of the sum of all passes where all were captured."""
    names = dict.fromkeys(name.rsplit(" ", 1)[0] for name in timing.seconds)
    for way in names:
        if all(f"{way} {side}" in timing.seconds for side in SIDES):
            timing = timing.summed(f"{way} all", [f"{way} {side}" for side in SIDES])
    for side in (*SIDES, "all"):
        here = Timing({way: timing.seconds[f"{way} {side}"] for way in names if f"{way} {side}" in timing.seconds})
        if "dense" in here.seconds:
            yield from (row(case, side, way, "dense", here) for way in here.seconds if way != "dense")


def peer_graph_rows(case: Case, contenders: tuple[Contender, ...]) -> Iterator[Row]:
    """Yield rows of ours, through autograd, against the peers that can be captured."""
    ours = contenders[0].label
    for kind in ("fwd", "step"):
        ways = {f"{c.label} {kind}": [c.runs[kind]] for c in contenders if c.peer.graphs and kind in c.runs}
        here = case._replace(calls=calls_of(ways, case.calls))
        replays, gone = graphed(ways, here.calls)
        yield from _left_out(here, gone)
        timing = in_turn({name.removesuffix(f" {kind}"): replay for name, replay in replays.items()}, case.rounds)
        if ours in timing.seconds:
            yield from (row(here, f"{kind} graph", ours, way, timing) for way in timing.seconds if way != ours)
