"""Max-pooling 3x3, stride 2, behind a ResNet's stem, forward + backward: packed against whole images.

On packed patches the halo is read through the slot map. Whole images are pooled by ``F.max_pool2d``, channels_last.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import pack, patch_max_pool2d, unpack

from .measure.scales import MASKED
from .measure.timing import check_parity, in_turn
from .subjects.encoders import DENSE, DENSE_AND_MASK
from .subjects.images import random_grid, random_image

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # gradients are summed where stencils overlap, and rounded


@pytest.mark.parametrize("engine", ["auto", "gather"])
def test_max_pool(benchmark, record, scale, engine):
    """An engine over whole images, plain and masked."""
    channels, p = 64, 16
    generator = torch.Generator().manual_seed(0)
    grid = random_grid(scale, generator)
    image, direction = (random_image(grid, channels, size, scale.precision, generator) for size in (p, p // 2))
    packed, g = pack(image, grid).requires_grad_(), pack(direction, grid)
    zeroed, g_zeroed = unpack(packed.detach(), grid).requires_grad_(), unpack(g, grid)
    image.requires_grad_()

    def ours() -> list[Tensor]:
        y = patch_max_pool2d(packed, grid, 3, 2, 1, backend=engine)
        return [y, *torch.autograd.grad(y, packed, g)]

    def masked() -> list[Tensor]:
        y = F.max_pool2d(zeroed, 3, 2, 1)
        return [y, *torch.autograd.grad(y, zeroed, g_zeroed)]

    def dense() -> list[Tensor]:
        y = F.max_pool2d(image, 3, 2, 1)
        return [y, *torch.autograd.grad(y, image, direction)]

    for name, own, whole in zip(("output", "gradient"), ours(), masked(), strict=True):
        check_parity(f"max-pool {engine} {name}", own.detach(), pack(whole.detach(), grid), LIMITS[scale.precision])
    timing = in_turn({engine: ours, DENSE: dense, DENSE_AND_MASK: masked}, scale.layer_rounds)
    case = f"max-pool 3x3 s2 p{p} C{channels} batch {scale.layer_batch} step"
    for rival in (DENSE, DENSE_AND_MASK):
        limit = 1 / (1 - MASKED) if rival == DENSE else None
        record("pool", case, engine, rival, *timing.compare(engine, rival, "ms"), masked=MASKED, limit=limit)
    benchmark.pedantic(ours, rounds=1)
