"""``python -m benchmarks roofline``: both ceilings of this machine, and the least time of each way of a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from ..measure.ceilings import Ceilings, ceilings, optimiser_seconds
from ..measure.machine import device_name
from ..measure.scales import scale_of
from ..measure.work import Counted, counted
from ..subjects.step_ways import WAYS, case_of, make_step

__all__ = ["lines", "roofline"]


def roofline(encoder: str, scale_name: str) -> int:
    """Print what every convolution and product of the exact step needs at least, and the sums of all ways."""
    scale = scale_of(scale_name)
    found = ceilings(scale)
    say = sys.stdout.write
    say(f"{device_name()}: copies {found.copy / 1e9:.1f} GB/s, multiply-adds ")
    rates = (f"{str(t).removeprefix('torch.')} {rate / 1e9:.0f} G/s" for t, rate in found.rate.items())
    say(", ".join(rates) + f"\n{case_of(encoder, scale)}\n")
    for way in WAYS:
        step = make_step(way, encoder, scale, scale.precision)
        layers = counted(step)
        if way == "exact":
            for line in lines(found, layers):
                say(line + "\n")
        macs = sum(layer.work.macs for layer in layers) / 1e9
        moved = sum(layer.work.bytes for layer in layers) / 2**30
        floor = found.total(layers) + optimiser_seconds(found, step.model)
        say(f"{way:18} {macs:9.1f} G multiply-adds {moved:8.2f} GiB  at least {floor:.4g} s\n")
    return 0


def lines(found: Ceilings, layers: Sequence[Counted]) -> Iterator[str]:
    """Yield a table of layers: multiply-adds, bytes, the floor and what it is bound by."""
    for layer in layers:
        bound = "products" if layer.work.macs / found.rate[layer.dtype] > layer.work.bytes / found.copy else "bytes"
        yield (
            f"{layer.name:22}{layer.work.macs / 1e9:9.3f} G {layer.work.bytes / 2**20:9.1f} MiB "
            f"{found.floor(layer.work, layer.dtype) * 1e3:9.3f} ms by {bound:8} {layer.shapes}"
        )
