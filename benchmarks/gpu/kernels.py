"""Check and time every Triton kernel on a GPU: ``python -m benchmarks.gpu.kernels [--only 3x3] [--masked 0.6 0.3]``.

First every kernel is compared with float64, then steps are captured in CUDA graphs and replayed on other data. Only
then are convolutions timed: against dense cuDNN on whole images and against ``gather`` as replayed graphs (no time of
the host in it), default and tuned, and against the peers that are installed (``benchmarks/peers``). Results are written
after each case and replace those of the same case, so that several calls fill one table: a CSV per suite and a JSON of
what tuning found, in ``results/<device>/``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from ..measure.machine import RESULTS, folder_name
from ..measure.rows import Row, merge
from ..peers import Packed, peers
from ..peers.contenders import Case, contenders, peak_rows, peer_rows
from ..subjects.convolutions import GROUPS, Shape, problem
from .densify import LEVELS, densify_rows
from .graphs import CALLS, graph_rows

COMMAND = "python -m benchmarks.gpu.kernels"


def save(rows: list[Row], folder: Path) -> None:
    """Write rows as CSV, keeping the lines of other cases, and everything that tuning measured as JSON."""
    from patchsparse.backends.triton.tuning import tune

    merge(rows, folder)
    with tune() as tuner:
        found = {str(key): [asdict(m) for m in measured] for key, measured in tuner.found.items()}
        seconds = tuner.seconds
    if found:
        tuned = folder / "gpu_tuned.json"
        before = json.loads(tuned.read_text())["found"] if tuned.exists() else {}
        content = {"seconds": seconds, "found": before | found}
        tuned.write_text(json.dumps(content, indent=1, default=str))


def cases(groups: Sequence[str], masked: Sequence[float]) -> Iterator[tuple[float, Shape | tuple[int, int]]]:
    """Yield masked shares and shapes, or levels to densify: all of them at the first share, then at the second."""
    every = GROUPS | {"densify": LEVELS}
    yield from product(masked, (shape for name in groups for shape in every[name]))


def measure(arguments: argparse.Namespace, folder: Path, began: float) -> None:
    """Time case after case until the time is up, and say what is left."""
    others = () if arguments.no_peers else peers()
    for peer in others:
        sys.stdout.write(f"peer      {peer.name}: {peer.why_not() or peer.note}\n")
    told: set[str] = {reason for peer in others if (reason := peer.why_not()) is not None}
    waiting = list(cases(arguments.only, arguments.masked))
    while waiting:
        if time.monotonic() - began > arguments.minutes * 60:
            left = ", ".join(f"{_named(shape)} masked {share:.2f}" for share, shape in waiting)
            sys.stdout.write(f"out of time after {arguments.minutes} minutes; choose with --only, --masked: {left}\n")
            return
        share, shape = waiting.pop(0)
        if not isinstance(shape, Shape):
            save(densify_rows(shape, share, arguments.batch, arguments.rounds), folder)
            continue
        drawn = problem(shape, share, arguments.batch, torch.bfloat16)
        case = Case(drawn, share, arguments.rounds, CALLS, not arguments.no_tune)
        found = contenders(case, Packed("triton"), (Packed("gather"), *others), told)
        save([*graph_rows(case, found), *peer_rows(case, found), *peak_rows(case, found)], folder)


def _named(shape: Shape | tuple[int, int]) -> str:
    return str(shape) if isinstance(shape, Shape) else f"norm + unpack p{shape[0]} C{shape[1]}"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    groups = [*GROUPS, "densify"]
    result = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    result.add_argument("--rounds", type=int, default=7, help="rounds of each timing (default: 7)")
    result.add_argument(
        "--masked", type=float, nargs="+", default=[0.6, 0.3, 0.5, 0.75], help="masked shares of the patches"
    )
    result.add_argument("--only", nargs="+", choices=groups, default=groups, help="groups of shapes to time")
    result.add_argument("--minutes", type=float, default=7.5, help="start no further case after so long (default: 7.5)")
    result.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<device>")
    result.add_argument("--check-only", action="store_true", help="take no times")
    result.add_argument("--no-check", action="store_true", help="check only what is timed")
    result.add_argument("--no-tune", action="store_true", help="time the default configurations only")
    result.add_argument("--no-peers", action="store_true", help="leave out other libraries")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, then the timings; return the exit status."""
    began = time.monotonic()
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write(f"{COMMAND} needs a CUDA device; on a CPU run pytest tests/kernels/test_triton.py\n")
        return 2
    reason = Packed("triton").why_not()
    if reason is not None:
        sys.stderr.write(f"{COMMAND} cannot run the triton engine: {reason}\n")
        return 2
    from .checks import check, check_graphs

    if not arguments.no_check:
        check("cuda")
        check_graphs("cuda")
    if not arguments.check_only:
        measure(arguments, arguments.out or RESULTS / folder_name(), began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
