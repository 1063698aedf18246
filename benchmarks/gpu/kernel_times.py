"""Say where a GPU's time goes, kernel by kernel: ``python -m benchmarks.gpu.kernel_times``.

Encoders (forward and backward) and whole training steps run as they are called, without a graph. For each is printed
the time of a step by the clock, the time in which the GPU computes, how many kernels are started, and those that take
longest. Where the clock's time is longer than the GPU's, the host is what is waited for.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from ..measure.device import aside, has_gpu, wait
from ..measure.machine import RESULTS, folder_name, provenance
from ..measure.scales import MASKED, Scale, scale_of
from ..measure.timing import said
from ..subjects.encoders import DENSE, encoders
from ..subjects.step_ways import make_step

__all__ = ["Found", "keep", "main", "measured", "subjects", "table"]

STEPS, WARM = 3, 4  # that are profiled, and before that
TIMED = 7
PRINTED = 14  # kernels of each subject
KEPT = 0.005  # milliseconds of a kernel in a step, from which on it is written down
NAME = "kernel_times.json"
# Encoders: timm's name, the name of the way, that of `subjects.encoders`, and whether norms are fused.
ENCODERS = (
    ("resnet18", "ours", "auto", None),
    ("resnet18", "ours, not fused", "auto", False),
    ("resnet18", "dense", DENSE, None),
    ("resnet50", "ours", "auto", None),
    ("resnet50", "dense", DENSE, None),
)
WAYS = ("dense", "exact", "sparse", "light")
Run = Callable[[], object]


@dataclass(frozen=True)
class Found:
    """What a step takes.

    Attributes:
        name: what runs.
        clock_ms: of a step by the clock of the host, the median.
        gpu_ms: in which kernels run.
        kernels: ``(name, started, ms)`` in a step, copies among them; the longest first.
    """

    name: str
    clock_ms: float
    gpu_ms: float
    kernels: tuple[tuple[str, float, float], ...]

    @property
    def started(self) -> float:
        """Kernels and copies that a step starts."""
        return sum(count for _, count, _ in self.kernels)


def subjects(scale: Scale) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yield a name, and what builds a step, for encoders and training steps."""
    for encoder, name, way, fuse in ENCODERS:
        sizes = scale.for_encoder(encoder)
        yield (
            f"encoder {encoder}, {name}",
            lambda e=encoder, s=sizes, w=way, f=fuse: encoders(e, ("auto",), MASKED, s, f).steps[w],
        )
    for way in WAYS:
        yield f"step resnet18, {way}", lambda w=way: make_step(w, "resnet18", scale)


def measured(name: str, run: Run) -> Found:
    """Time and profile a step."""
    seconds = []
    for index in range(WARM + TIMED):
        wait()
        started = time.perf_counter()
        run()
        wait()
        if index >= WARM:
            seconds.append(time.perf_counter() - started)
    kernels = tuple(_kernels(run)) if ProfilerActivity.CUDA in supported_activities() else ()
    return Found(name, statistics.median(seconds) * 1e3, sum(ms for *_, ms in kernels), kernels)


def _kernels(run: Run) -> list[tuple[str, float, float]]:
    """Return ``(name, started, ms)`` of the kernels and copies of a step, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(STEPS):
            run()
        wait()
    found: dict[str, list[float]] = defaultdict(list)
    for event in record.events() or ():
        if event.device_type.name == "CUDA":
            found[_short(event.name)].append(event.time_range.elapsed_us() / 1e3)
    kernels = [(name, len(ms) / STEPS, sum(ms) / STEPS) for name, ms in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel[2])


def _short(name: str) -> str:
    """Return the name of a kernel without types and parameters of templates that are the same for all."""
    name = re.sub(r"^void ", "", name).replace("at::native::", "").replace("(anonymous namespace)::", "")
    return re.sub(r"\(.*", "", name)[:110]


def table(found: Found) -> str:
    """Return what a step takes, and its longest kernels."""
    head = (
        f"{found.name}: {found.clock_ms:.2f} ms by the clock, {found.gpu_ms:.2f} ms of kernels, "
        f"{found.started:.0f} started"
    )
    rows = [f"  {ms:8.3f} ms {count:6.0f}  {name}" for name, count, ms in found.kernels[:PRINTED]]
    return "\n".join([head, *rows])


def keep(found: Found, path: Path) -> None:
    """Write what a step takes into a file, without its shortest kernels, and where it comes from; the rest stays."""
    known = json.loads(path.read_text()) if path.exists() else {}
    kernels = [kernel for kernel in found.kernels if kernel[2] >= KEPT]
    known[found.name] = asdict(found) | {"kernels": kernels, "origin": provenance()}
    path.write_text(json.dumps(known, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Print and keep where the time goes; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernel_times", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<device>")
    parser.add_argument("--only", default="", metavar="TEXT", help="of those whose names have this text")
    options = parser.parse_args(argv)
    if not has_gpu():
        sys.stderr.write("python -m benchmarks.gpu.kernel_times needs a CUDA device: it times its kernels\n")
        return 2
    folder = options.out or RESULTS / folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    right = True
    with aside():
        for name, build in subjects(scale_of("quick")):
            if options.only not in name:
                continue
            try:
                with said(name):
                    found = measured(name, build())
                keep(found, folder / NAME)
                sys.stdout.write(table(found) + "\n")
            except Exception as error:  # one of them must not cost the others
                right = False
                sys.stdout.write(f"{name}: FAILED, {type(error).__name__}: {str(error)[:300]}\n")
            sys.stdout.flush()
            torch.cuda.empty_cache()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
