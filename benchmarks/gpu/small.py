"""Run six kernels once each, for a profiler or a sanitizer around this process: ``python -m benchmarks.gpu.small``.

Everything is compiled and warm before the part that a profiler sees, which ``cudaProfilerStart`` begins. With
``--tiny`` the grids are tiny, and PyTorch asks the driver for each tensor, so that a sanitizer knows where one ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from patchsparse import patch_batch_norm_unpack

from ..measure.device import device, has_gpu, profiled, wait
from ..subjects.convolutions import GROUPS, operators, problem

__all__ = ["main", "runs"]


def runs(batch: int, where: str) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Yield six kernels: all passes of a 3x3 layer, the stem, 7x7 depthwise, norm + unpack."""
    first = GROUPS["3x3"][0]
    for side, run in operators(problem(first, 0.6, batch, torch.bfloat16, where), "triton").items():
        yield f"{side} {first}", run
    for group in ("stem", "depthwise"):
        shape = GROUPS[group][0]
        yield f"fwd {shape}", operators(problem(shape, 0.6, batch, torch.bfloat16, where), "triton")["fwd"]
    p = problem(first, 0.6, batch, torch.bfloat16, where)
    token = torch.randn(first.c_in, device=where)
    yield (
        "norm + unpack",
        lambda: [patch_batch_norm_unpack(p.x, p.grid, None, None, None, None, token, backend="triton")],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one image, for a sanitizer")
    tiny = parser.parse_args(argv).tiny
    if not has_gpu():
        sys.stderr.write("python -m benchmarks.gpu.small needs a CUDA device: its kernels are looked at there\n")
        return 2
    if tiny:
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    found = list(runs(1 if tiny else 128, device().type))
    for _, run in found:
        run()
    wait()
    with profiled():
        results = [(name, run()[0]) for name, run in found]
        wait()
    for name, result in results:
        sys.stdout.write(f"{name}: {'finite' if bool(torch.isfinite(result).all()) else 'NOT FINITE'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
