"""Check and time every Triton kernel on a GPU: ``python -m benchmarks.gpu.kernels [--only 3x3] [--masked 0.6 0.3]``.

First every kernel is compared with float64, and steps are captured in CUDA graphs and replayed on other data; what
misses has no figures. Then convolutions are timed against dense cuDNN on whole images and against ``gather`` as
replayed graphs (no time of the host in it), as they ship and tuned, and two of them against the peers that are
installed (``benchmarks/peers``). Each row is written when it is known and replaces that of the same case, so that
several calls fill one table. What tuning found lies in ``tuned.json``, as in the package.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch

from ..measure.device import aside, has_gpu
from ..measure.machine import RESULTS, folder_name
from ..measure.rows import Row, left_out, merge
from ..peers import Packed, peers
from ..peers.contenders import Case, contenders, peak_rows, peer_rows, say
from ..subjects.convolutions import GROUPS, Shape, problem
from .checks import MODES, NORM_UNPACK, check, check_graphs, keep, missed, name_of
from .densify import LEVELS, densify_rows
from .graphs import CALLS, graph_rows, peer_graph_rows

COMMAND = "python -m benchmarks.gpu.kernels"
PEERS = (GROUPS["3x3"][0], GROUPS["3x3"][3])  # the shapes that other libraries are timed on, which takes them long


class Asked(NamedTuple):
    """One case to time: its group, the masked share, and the shape or the level to densify."""

    group: str
    masked: float
    what: Shape | tuple[int, int]

    @property
    def name(self) -> str:
        """Name for a reader."""
        named = str(self.what) if isinstance(self.what, Shape) else f"norm + unpack p{self.what[0]} C{self.what[1]}"
        return f"{named}{' and peers' if self.group == 'peers' else ''} masked {self.masked:.2f}"

    @property
    def checked(self) -> str:
        """Name of its check."""
        return name_of(self.what) if isinstance(self.what, Shape) else NORM_UNPACK


def cases(groups: Sequence[str], masked: Sequence[float], once: Sequence[str] = ()) -> Iterator[Asked]:
    """Yield what to time: groups at the first masked share, then at the second; then ``once`` at the first alone."""
    every = {**GROUPS, "densify": LEVELS, "peers": PEERS}
    for share, name in (*product(masked, groups), *product(masked[:1], once)):
        yield from (Asked(name, share, what) for what in every[name])


def rows_of(asked: Asked, arguments: argparse.Namespace, told: set[str], device: str = "cuda") -> Iterator[Row]:
    """Yield the rows of one case as they become known."""
    if not isinstance(asked.what, Shape):
        yield from densify_rows(asked.what, asked.masked, arguments.batch, arguments.rounds, device)
        return
    drawn = problem(asked.what, asked.masked, arguments.batch, torch.bfloat16, device)
    case = Case(drawn, asked.masked, arguments.rounds, CALLS, not arguments.no_tune)
    if asked.group != "peers":
        yield from graph_rows(case)
        return
    found = contenders(case, Packed("triton", device), (Packed("gather", device), *peers()), told)
    yield from peer_rows(case, found)
    yield from peer_graph_rows(case, found)
    yield from peak_rows(case, found)


def measure(arguments: argparse.Namespace, folder: Path, began: float) -> None:
    """Time case after case until the time is up, and say what is left; what fails is left out with its reason."""
    if "peers" in (*arguments.only, *arguments.once):
        for peer in peers():
            sys.stdout.write(f"peer      {peer.name}: {peer.why_not() or peer.note}\n")
    told: set[str] = {reason for peer in peers() if (reason := peer.why_not()) is not None}
    wrong, waiting = missed(folder, "bfloat16"), list(cases(arguments.only, arguments.masked, arguments.once))
    while waiting:
        if time.monotonic() - began > arguments.minutes * 60:
            left = ", ".join(asked.name for asked in waiting)
            sys.stdout.write(f"out of time after {arguments.minutes} minutes; choose with --only, --masked: {left}\n")
            return
        asked = waiting.pop(0)
        if reason := wrong.get(asked.checked):
            merge([say(left_out(asked.name, "triton", reason, asked.masked))], folder)
            continue
        try:
            for row in rows_of(asked, arguments, told):
                merge([row], folder)
            if not arguments.no_tune:
                from .tune import keep_all

                keep_all(folder)
        except Exception as error:  # one case must not cost the others
            merge([say(left_out(asked.name, "triton", f"{type(error).__name__}: {error}", asked.masked))], folder)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    groups = [*GROUPS, "densify", "peers"]
    result = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    result.add_argument("--rounds", type=int, default=7, help="rounds of each timing (default: 7)")
    result.add_argument(
        "--masked", type=float, nargs="+", default=[0.6, 0.3, 0.5, 0.75], help="masked shares of the patches"
    )
    result.add_argument("--only", nargs="+", choices=groups, default=groups, help="groups to time; default all")
    result.add_argument("--once", nargs="+", choices=groups, default=[], help="more groups, at the first share alone")
    result.add_argument("--minutes", type=float, default=7.5, help="start no further case after so long (default: 7.5)")
    result.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<device>")
    result.add_argument("--check-only", action="store_true", help="take no times")
    result.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="modes to check; default all")
    result.add_argument("--no-check", action="store_true", help="check only what is timed")
    result.add_argument("--no-tune", action="store_true", help="time the default configurations only")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, then the timings; return the exit status."""
    began = time.monotonic()
    arguments = parser().parse_args(argv)
    if not has_gpu():
        sys.stderr.write(f"{COMMAND} needs a CUDA device; on a CPU run pytest tests/kernels/test_triton.py\n")
        return 2
    reason = Packed("triton").why_not()
    if reason is not None:
        sys.stderr.write(f"{COMMAND} cannot run the triton engine: {reason}\n")
        return 2
    folder, right = arguments.out or RESULTS / folder_name(), True
    with aside():
        if not arguments.no_check:
            right = keep(chain(check_graphs("cuda"), check("cuda", arguments.modes)), folder)
        if not arguments.check_only:
            torch.backends.cudnn.benchmark = True  # the rivals take the fastest of cuDNN's kernels
            measure(arguments, folder, began)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
