"""Batch norm + ReLU + residual over visible positions, forward + backward: packed against whole images.

Packed rows hold visible positions alone, so that PyTorch's own norm is the sparse one. ``fused`` is one operator for
all three: kernels on a GPU, plain PyTorch elsewhere, which its row against ``packed`` tells `sparsify` to leave. SparK
gathers visible positions out of the whole image by ``nonzero`` and puts them back. Plain dense norms whole images. Its
result is another one, since its statistics take in hidden positions; it shows the cost of a layer that ignores the
mask.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import pack, patch_batch_norm_act, unpack

from .measure.scales import MASKED
from .measure.timing import check_parity, in_turn
from .subjects.convolutions import GROUPS, LIMITS
from .subjects.encoders import DENSE, DENSE_AND_MASK
from .subjects.images import random_grid, random_image


@pytest.mark.parametrize("shape", [GROUPS["3x3"][0], GROUPS["3x3"][2]], ids=str)
def test_norm(benchmark, record, scale, shape):
    """Packed rows and the fused operator over whole images, plain and masked."""
    generator = torch.Generator().manual_seed(0)
    grid, channels = random_grid(scale, generator), shape.c_in
    pixels = grid.pixels([patches * shape.p for patches in grid.shape])

    def masked_norm(x: Tensor, residual: Tensor) -> Tensor:
        rows = F.batch_norm(x.permute(0, 2, 3, 1)[pixels], None, None, weight, bias, training=True)
        y = x.new_zeros(x.shape[0], *x.shape[2:], channels)
        y[pixels] = rows
        return F.relu(y.permute(0, 3, 1, 2) + residual)

    weight, bias = (torch.rand(channels, generator=generator).to(scale.device).requires_grad_() for _ in range(2))
    image, residual, g = (random_image(grid, channels, shape.p, scale.precision, generator) for _ in range(3))
    packed = [pack(t, grid) for t in (image, residual, g)]
    zeroed = [unpack(t, grid) for t in packed]

    def step(run, operands: list[Tensor]):
        x, r = (t.detach().clone().requires_grad_() for t in operands[:2])

        def both() -> list[Tensor]:
            y = run(x, r)
            return [y, *torch.autograd.grad(y, (x, r, weight, bias), operands[2])]

        return both

    def plain(x: Tensor, r: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + r)

    def fused(x: Tensor, r: Tensor) -> Tensor:
        return patch_batch_norm_act(x, weight, bias, None, None, True, activation="relu", residual=r)

    ours = {"packed": step(plain, packed), "packed, fused": step(fused, packed)}
    rivals = {DENSE: step(plain, [image, residual, g]), DENSE_AND_MASK: step(masked_norm, zeroed)}
    names = ("output", "input gradient", "residual gradient", "weight gradient", "bias gradient")
    for way, run in ours.items():
        for name, own, whole in zip(names, run(), rivals[DENSE_AND_MASK](), strict=True):
            expected = pack(whole.detach(), grid) if whole.ndim == 4 else whole
            check_parity(f"norm {way} p{shape.p} {name}", own, expected, LIMITS[scale.precision])
    timing = in_turn({**ours, **rivals}, scale.layer_rounds)
    case = f"batch norm + residual + ReLU p{shape.p} C{channels} batch {scale.layer_batch} step"
    for way in ours:
        for rival in rivals:
            limit = 1 / (1 - MASKED) if rival == DENSE else None
            record("norm", case, way, rival, *timing.compare(way, rival, "ms"), masked=MASKED, limit=limit)
    record("norm", case, "packed, fused", "packed", *timing.compare("packed, fused", "packed", "ms"), masked=MASKED)
    benchmark.pedantic(ours["packed"], rounds=1)
