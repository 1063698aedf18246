"""Say which card this is, and measure both of its ceilings on random data: ``python -m benchmarks.gpu.identify``.

Where they are far from what such cards do, the card is shared or throttled, and no other figure means anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..measure.ceilings import measure_ceilings
from ..measure.device import aside, device, has_gpu
from ..measure.machine import RESULTS, folder_name, provenance
from ..measure.scales import scale_of

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print card, versions and ceilings, and keep them in ``card.json``; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.identify", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<device>")
    folder = parser.parse_args(argv).out or RESULTS / folder_name()
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
    known["copy_tb_per_s"] = f"{found.copy / 1e12:.2f}"
    known["bfloat16_tflop_per_s"] = f"{2 * found.rate[torch.bfloat16] / 1e12:.0f}"
    known["matrix_side"] = str(sizes.matrix_side)
    for name, value in known.items():
        sys.stdout.write(f"{name:22} {value}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(known, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
