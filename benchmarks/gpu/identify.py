"""Say which card this is, and measure both of its ceilings on random data: ``python -m benchmarks.gpu.identify``.

Where they are far from what such cards do, the card is shared or throttled, and no other figure means anything. What
it costs the host to start a small kernel, by PyTorch and by Triton, bounds all that runs kernel by kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..measure.ceilings import measure_ceilings
from ..measure.device import aside, device, has_gpu, wait
from ..measure.machine import kept_in, provenance
from ..measure.scales import scale_of

__all__ = ["main"]


def starts(count: int = 1000, rounds: int = 5) -> dict[str, float]:
    """Return microseconds of the host for the start of a small kernel: a PyTorch operator, and one by Triton."""
    from patchsparse.backends.triton.tf32 import rounding_start

    x = torch.ones(1024, device=device())
    start, y, found = rounding_start(x.numel(), x.device), torch.empty_like(x), {}
    for name, run in {"pytorch": lambda: x.add_(1), "triton": lambda: start(x, y)}.items():
        seconds = []
        for _ in range(rounds):
            wait()
            began = time.perf_counter()
            for _ in range(count):
                run()
            wait()
            seconds.append(time.perf_counter() - began)
        found[name] = min(seconds) / count * 1e6
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print card, versions and ceilings, and keep them in ``card.json``; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.identify", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default benchmarks/results/<card>, without a card none"
    )
    folder = kept_in(parser.parse_args(argv).out)
    known = provenance()
    if has_gpu():
        properties = torch.cuda.get_device_properties(0)
        known |= {
            "multiprocessors": str(properties.multi_processor_count),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": f"{properties.total_memory / 2**30:.1f}",
        }
    sizes = scale_of("quick")
    with aside():
        found = measure_ceilings(device(), sizes.copy_bytes, sizes.matrix_side, (torch.bfloat16,))
    known |= {f"{name}_start_us": f"{us:.1f}" for name, us in starts().items()} if has_gpu() else {}
    known["copy_tb_per_s"] = f"{found.copy / 1e12:.2f}"
    known["bfloat16_tflop_per_s"] = f"{2 * found.rate[torch.bfloat16] / 1e12:.0f}"
    known["matrix_side"] = str(sizes.matrix_side)
    for name, value in known.items():
        sys.stdout.write(f"{name:22} {value}\n")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "card.json").write_text(json.dumps(known, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
