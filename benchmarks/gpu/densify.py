"""Time batch norm + ``unpack`` with a mask token, as densifying does it: one operator against its two parts.

Both as replayed CUDA graphs, forward alone and with the backward pass; the results are compared first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import PatchGrid, patch_batch_norm_unpack, unpack

from ..measure.rows import Row, left_out, make_row
from ..measure.timing import check_parity, in_turn
from ..peers.contenders import say
from ..subjects.convolutions import Run
from .graphs import calls_of, graphed

__all__ = ["LEVELS", "densify_rows"]

LEVELS = ((8, 64), (4, 128), (2, 256), (1, 512))  # pixels along a patch and channels of a ResNet-18's stages


def densify_rows(level: tuple[int, int], masked: float, batch: int, rounds: int, device: str = "cuda") -> Iterator[Row]:
    """Yield rows of the fused operator against its two parts, bfloat16 features and float32 parameters."""
    p, channels = level
    generator = torch.Generator(device).manual_seed(0)
    grid = PatchGrid.random(batch, (9, 9), 1 - masked, generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x = normal(grid.num_active, channels, p, p).bfloat16().contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), *(normal(channels).requires_grad_() for _ in range(3))]
    g = normal(batch, channels, 9 * p, 9 * p).bfloat16().contiguous(memory_format=torch.channels_last)

    def fused() -> Tensor:
        x, weight, bias, token = leaves
        return patch_batch_norm_unpack(x, grid, weight, bias, None, None, token)

    def apart() -> Tensor:
        x, weight, bias, token = leaves
        return unpack(F.batch_norm(x, None, None, weight, bias, training=True), grid, token)

    def step(run) -> Run:
        def both() -> list[Tensor]:
            y = run()
            return [y, *torch.autograd.grad(y, leaves, g)]

        return both

    for name, one, other in zip(("y", "x", "weight", "bias", "token"), step(fused)(), step(apart)(), strict=True):
        check_parity(f"norm + unpack {name} p{p} C{channels}", one.detach(), other.detach(), 2e-2)
    ours, parts = "fused", "batch_norm, unpack"
    for kind, runs in {
        "fwd": {ours: [lambda: [fused()]], parts: [lambda: [apart()]]},
        "step": {ours: [step(fused)], parts: [step(apart)]},
    }.items():
        case, calls = f"norm + unpack p{p} C{channels} {kind}", calls_of(runs)
        replays, gone = graphed(runs, calls)
        yield from (say(left_out(case, way, reason, masked)) for way, reason in gone.items())
        if not gone:
            compared = in_turn(replays, rounds).compare(ours, parts, "ms", calls)
            yield say(make_row("norm", case, ours, parts, *compared, masked=masked))
