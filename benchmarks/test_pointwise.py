"""1x1 convolutions on packed patches, forward + backward: one product of all rows against ``F.conv2d``.

Half of a ResNet-50's products. Batch 4 of 288x288 in 9x9 patches, 60 % masked: 128 packed patches.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse.geometry import Window
from patchsparse.local import local_conv2d

from .timing import check_parity, in_turn

PATCHES = 128
SHAPES = [(8, 64, 256), (8, 256, 64), (4, 128, 512), (4, 512, 128), (2, 256, 1024), (2, 1024, 256), (1, 512, 2048)]
WINDOW = Window((1, 1))


def step(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Return output, input gradient and weight gradient."""
    y = convolve(x, weight)
    return [y, *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "inputs", "outputs"), SHAPES)
def test_product_against_conv2d(benchmark, record, size, inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(0)

    def packed(channels: int) -> Tensor:
        values = torch.randn(PATCHES, channels, size, size, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    weight = (torch.randn(outputs, inputs, 1, 1, generator=generator) / inputs**0.5).to(dtype).requires_grad_()
    x, grad = packed(inputs).requires_grad_(), packed(outputs)
    ways = {
        "product": lambda: step(lambda a, w: local_conv2d(a, w, None, WINDOW, 1), x, weight, grad),
        "conv2d": lambda: step(F.conv2d, x, weight, grad),
    }
    name = str(dtype).removeprefix("torch.")
    for ours, theirs in zip(ways["product"](), ways["conv2d"](), strict=True):
        check_parity(f"1x1 {name}", ours, theirs, 1e-5 if dtype == torch.float32 else 1e-2)
    timing = in_turn(ways, rounds=11)
    medians = (timing.median("product"), timing.median("conv2d"))
    case = f"1x1 p={size} {inputs} -> {outputs} {name}"
    record("pointwise", case, "product", "conv2d", timing.ratio("conv2d", "product"), medians, "s")
    benchmark.pedantic(ways["product"], rounds=3)
