"""What oneDNN gets wrong, on every instruction set that it can be held to, each in a process with a checked heap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ISAS = ("SSE41", "AVX2", "AVX512_CORE", "DEFAULT")  # DEFAULT: all that the processor has
HEAP = next(Path("/usr/lib").glob("*/libc_malloc_debug.so.0"), None)  # glibc's: it aborts where a block was overrun
CHECK = """
import torch
from torch import nn
from patchsparse import PatchGrid, sparsify
from patchsparse.backends import dense, gather
from patchsparse.geometry import Stencil
from patchsparse.grid import whole_grid
from patchsparse.onednn import ClearConv2d, keep_clear
from patchsparse.testing import DenseAndMask

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # roundings; of x, to the greatest value


def gradients(layer, x, grad):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)


def by_engine(body, conv, x, grad):
    stencil = Stencil(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    grid, weight = whole_grid(x.shape[0]), conv.weight.detach()
    maps = grid.slot, grid.coords
    return (
        body.conv2d_dgrad(grad, weight, *maps, tuple(x.shape[2:]), stencil, conv.groups),
        body.conv2d_wgrad(x, grad, *maps, stencil, conv.groups),
    )


def check(dtype, size, channels, out, kernel, **options):
    def make(dtype):
        torch.manual_seed(0)
        return nn.Conv2d(channels, out, kernel, **options, bias=False).to(dtype, memory_format=torch.channels_last)

    conv = keep_clear(nn.Sequential(make(dtype)))[0]
    assert type(conv) is ClearConv2d
    x = torch.randn(2, channels, size, size).to(dtype, memory_format=torch.channels_last)
    grad = torch.randn_like(conv(x).detach())
    exact = make(dtype).double()
    expected = gradients(exact, x.double(), grad.double())
    grid = PatchGrid.from_active(torch.ones(2, 1, 1, dtype=torch.bool))
    ways = {
        "module": gradients(conv, x, grad),
        "sparsified": gradients(sparsify(make(dtype)), x, grad),
        "dense and mask": gradients(DenseAndMask(make(dtype), grid), x, grad),
        "dense": by_engine(dense, conv, x, grad),
        "gather": by_engine(gather, conv, x, grad),
    }
    for way, found in ways.items():
        for name, f, e in zip(("x", "weight"), found, expected, strict=True):
            error = (f.double() - e).abs().max() / e.abs().max()
            assert error < LIMITS[dtype], f"{way}: {name} of {dtype} {channels} {out} {kernel} {options}: {error}"


check(torch.float32, 16, 5, 7, 1, stride=2)
check(torch.float32, 64, 12, 16, 1, stride=2)
check(torch.bfloat16, 64, 4, 8, 1, stride=2)
check(torch.bfloat16, 12, 32, 32, 3, dilation=2, padding=2)
check(torch.bfloat16, 12, 6, 12, 3, dilation=(1, 3), padding=(1, 3), groups=2)
check(torch.float16, 12, 6, 6, 3, dilation=2, padding=2, groups=6)
with torch.autocast("cpu", torch.bfloat16):
    layer = ClearConv2d(4, 8, 3, padding=2, dilation=2)
    y = layer(torch.randn(1, 4, 8, 8))
assert y.dtype == torch.bfloat16
assert torch.autograd.grad(y.sum(), layer.weight)[0].isfinite().all()
print("all are right")
"""


@pytest.mark.parametrize("isa", [isa if isa == "AVX2" else pytest.param(isa, marks=pytest.mark.rest) for isa in ISAS])
def test_gradients_are_right_and_no_memory_is_damaged(isa: str) -> None:
    """Without the guard: wrong weight gradients, a damaged heap, a process that hangs or dies, by chance."""
    surroundings = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "2"}
    if HEAP is not None:
        surroundings["LD_PRELOAD"] = str(HEAP)
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env=surroundings, capture_output=True, text=True, check=False, timeout=300
    )
    assert (run.returncode, run.stdout.strip()) == (0, "all are right"), run.stderr[-2000:]
