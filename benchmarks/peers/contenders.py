"""Our engine and its peers on one convolution: each checked, then timed beside ours on the same active patches.

All are called as their users call them, through autograd. ``fwd + map`` and ``step + map`` build the kernel map anew,
as training needs it, where every step has a new mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..measure.rows import Row, line, make_row
from ..measure.timing import GATE, Ratio, Timing, in_turn, peak_bytes
from ..subjects.convolutions import LIMITS, Problem, Run, reference
from .base import Peer, check, passes
from .packed import Packed

__all__ = ["Case", "Contender", "contenders", "peak_rows", "peer_rows", "row", "say"]

KINDS = ("fwd", "dgrad", "wgrad", "bwd", "step", "fwd + map", "step + map")


class Case(NamedTuple):
    """A problem and how to time it.

    Attributes:
        p: the convolution.
        masked: share of the patches that were hidden when it was drawn.
        rounds: how often to time it.
        calls: how many calls make one time, so that the start of a replay or the wait at its end does not count.
        tuned: whether to time tuned kernels too.
    """

    p: Problem
    masked: float
    rounds: int
    calls: int = 1
    tuned: bool = False

    def named(self, kind: str) -> str:
        """Return the name of a row: shape, type and pass."""
        return f"{self.p.shape} {str(self.p.x.dtype).removeprefix('torch.')} {kind}"


@dataclass(frozen=True)
class Contender:
    """A peer on one problem, checked and ready to run: its label, its passes and the peer itself."""

    label: str
    runs: dict[str, Run]
    peer: Peer


def say(row: Row) -> Row:
    """Print a row as soon as it is known."""
    sys.stdout.write(line(row) + "\n")
    sys.stdout.flush()
    return row


def row(case: Case, kind: str, way: str, against: str, timing: Timing) -> Row:
    """Return a row of the table: how many times longer ``against`` takes than ``way``, and milliseconds of a call."""
    found = timing.compare(way, against, "ms", case.calls)
    limit = case.p.limit if against == "dense" else None
    return say(make_row("conv", case.named(kind), way, against, *found, masked=case.masked, limit=limit))


def repeated(run: Run, calls: int) -> Callable[[], None]:
    """Return a function that calls ``run`` ``calls`` times."""

    def several() -> None:
        for _ in range(calls):
            run()

    return several


def _dtype(peer: Peer, wanted: torch.dtype) -> torch.dtype:
    """Return the type to run a peer in: the wanted one, or the first of its own, halves before float32."""
    halves = (t for t in peer.dtypes if t != torch.float32)
    return wanted if wanted in peer.dtypes else next(halves, peer.dtypes[0])


def _ready(case: Case, peers: tuple[Peer, ...], told: set[str]) -> Iterator[Contender]:
    """Yield the peers that can run and whose results agree with dense-and-mask; say once why others are left out."""
    for peer in peers:
        reason = peer.why_not(case.p.shape)
        if reason is None:
            p = case.p.to(_dtype(peer, case.p.x.dtype))
            label = peer.label(p.x.dtype)
            try:
                layer = peer.build(p)
                errors = check(layer, p, reference(p))
                limit = LIMITS[p.x.dtype]
                if max(errors.values()) <= limit:
                    GATE.let(f"{label} {p.shape}", max(errors.values()), limit)
                    yield Contender(label, passes(layer, p, peer.parts), peer)
                    continue
                reason = f"{label} {p.shape} deviates from dense-and-mask by {errors}; no time is taken"
            except Exception as error:  # whatever a library raises must not cost the other measurements
                reason = f"{label} {p.shape} failed: {type(error).__name__}: {error}"
        if reason not in told:
            told.add(reason)
            sys.stdout.write(f"left out  {reason}\n")


def contenders(case: Case, ours: Packed, peers: tuple[Peer, ...], told: set[str]) -> tuple[Contender, ...]:
    """Return our own engine, then the peers that are fit to be timed on this case.

    Raises AssertionError if ours is not: then there is nothing to compare.
    """
    GATE.close()
    found = tuple(_ready(case, (ours, *peers), told))
    if not found or found[0].peer is not ours:
        raise AssertionError(f"the {ours.name} engine did not run {case.p.shape} rightly; see the line above")
    return found


def peer_rows(case: Case, contenders: tuple[Contender, ...], kinds: tuple[str, ...] = KINDS) -> list[Row]:
    """Return rows of the first contender against each other one, called from Python; with and without their maps."""
    ours, *others = contenders
    rows = []
    for kind in kinds:
        able = [c for c in others if kind in c.runs and (c.peer.maps or not kind.endswith("map"))]
        if not able:
            continue
        timing = in_turn({c.label: repeated(c.runs[kind], case.calls) for c in (ours, *able)}, case.rounds)
        rows += [row(case, f"{kind} eager", ours.label, c.label, timing) for c in able]
    return rows


def peak_rows(case: Case, contenders: tuple[Contender, ...]) -> list[Row]:
    """Return rows of the bytes that a step takes above what was allocated before."""
    taken = {}
    for c in contenders:
        run = c.runs.get("step") or c.runs["step + map"]
        taken[c.label] = peak_bytes(run, case.p.x.device) / 2**20
    ours, *others = taken
    name, least = case.named("peak of a step"), max(taken[ours], 1e-9)
    return [
        say(make_row("layer_memory", name, ours, other, Ratio.exact(taken[other] / least), (least, taken[other]), "MiB",
                     masked=case.masked))
        for other in others
    ]  # fmt: skip
