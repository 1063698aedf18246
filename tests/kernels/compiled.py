"""Compile every shipped kernel configuration ahead of time, without a GPU, and read what ptxas made of it.

Run as ``python -m tests.kernels.compiled`` for the whole table: all kernels and configurations on all architectures,
or on those named, such as ``90``.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patchsparse.backends.triton import configs, conv, norm
from patchsparse.backends.triton import depthwise_pool as pool
from patchsparse.backends.triton import norm_unpack as image
from patchsparse.backends.triton.launch import Launch, rows_like
from patchsparse.geometry import Stencil

from .compiled_stem import stems

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one program may take
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Usage:
    """Registers per thread, bytes of local memory per thread (spills), bytes of shared memory, matrix instructions."""

    registers: int
    local: int
    shared: int
    products: int
    pending: int  # copies still in flight while a step of the main loop waits for its operands


def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Compile a launch as its first call on a GPU would: the same constants, types and alignments."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = "i32" if isinstance(value, int) else f"*{TYPES[value.dtype]}"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name], constants[name] = "constexpr", value
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", report)[0]) for what in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    return Usage(registers, stack + local, compiled.metadata.shared, products, max(waits, default=0))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


GRID = (_meta(128, 9, 9, dtype=torch.int32), _meta(4096, 3, dtype=torch.int32))  # slot, coords: 9x9, 32 visible
SAME3, SAME7 = (Stencil((k, k), (1, 1), (k // 2, k // 2), (1, 1)) for k in (3, 7))
STRIDED = Stencil((3, 3), (2, 2), (1, 1), (1, 1))


def forward(tile: configs.Tile, dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 2) -> Launch:
    x, w, y = _meta(4096, p, p, c, dtype=dtype), _meta(c, 3, 3, c, dtype=dtype), _meta(1, dtype=dtype)
    strides = {"w_first": 0, "w_out": 9 * c, "w_tap": c, "w_in": 1}
    y = rows_like(y, 4096, (p, p), c)
    return conv.forward_launch(x, w, _meta(c, dtype=dtype), y, *GRID, SAME3, 1, (c, c), strides, False, tile)


def input_gradient(tile: configs.Tile, dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 4) -> Launch:
    """Return the launch of the input gradient at stride 2: the transposed kernel."""
    g, w = _meta(4096, p // 2, p // 2, c, dtype=dtype), _meta(c, 3, 3, c, dtype=dtype)
    strides = {"w_first": 0, "w_out": 1, "w_tap": c, "w_in": 9 * c}
    y = rows_like(g, 4096, (p, p), c)
    return conv.forward_launch(g, w, None, y, *GRID, STRIDED, 1, (c, c), strides, True, tile)


def weight_gradient(tile: configs.Tile, dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 2) -> Launch:
    x, w = _meta(4096, p, p, c, dtype=dtype), _meta(c, c, 3, 3, dtype=dtype)
    return conv.wgrad_launches(x, x, w, *GRID, SAME3, 1, tile)[0]


def memory_bound(c: int = 128, p: int = 8) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of depthwise convolution, pooling and the sum over splits."""
    x, w = _meta(4096, p, p, c), _meta(c, 1, 7, 7)
    y, half = rows_like(x, 4096, (p, p), c), rows_like(x, 4096, (p // 2, p // 2), c)
    yield "depthwise", pool.depthwise_launch(x, w, _meta(c), y, *GRID, SAME7, False)
    yield "depthwise dgrad", pool.depthwise_launch(x, w, None, y, *GRID, SAME7, True)
    partial, total = pool.depthwise_wgrad_launches(x, x, w, *GRID, SAME7)
    yield "depthwise wgrad", partial
    yield "sum of splits", total
    tap = torch.empty_like(half, dtype=torch.uint8)
    yield "max-pool", pool.pool_launch(x, half, tap, *GRID, STRIDED)
    rows, taps = half.permute(0, 2, 3, 1), tap.permute(0, 2, 3, 1)
    yield "max-pool grad", pool.pool_grad_launch(rows, taps, y, *GRID, STRIDED)


def norms(c: int = 256, p: int = 4) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of fused batch normalisation, with residual and ReLU."""
    x, single = _meta(4096, p, p, c), torch.float32
    y = rows_like(x, 4096, (p, p), c)
    statistics = (_meta(c, dtype=single), _meta(c, dtype=single), _meta(c), _meta(c))
    moments = norm.moments_launches(x, *statistics[:2])
    sums, options = (_meta(c, dtype=single), _meta(c, dtype=single)), (1e-5, "relu", 0.01)
    grads = norm.sums_launches(x, x, x, (y, *sums), statistics, options)
    apply = norm.apply_launch(x, x, y, statistics, (1e-5, "silu", 0.01))
    alone, residual = (norm.grad_apply_launch(x, x, gr, sums, y, statistics, options, True) for gr in (None, x))
    for launch in (*moments, apply, *grads, alone, residual):
        kind = " of a residual" if launch is residual else ""
        yield f"{launch.kernel.__name__}{kind} C{c}", launch


def unpacks(dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 4) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of batch normalisation fused with ``unpack``; 40 % of 128 images of 9x9 patches are active."""
    single = torch.float32
    x, images = _meta(4096, p, p, c, dtype=dtype), _meta(128, 9 * p, 9 * p, c, dtype=dtype)
    mean, rstd, weight, bias = (_meta(c, dtype=single) for _ in range(4))
    statistics = (mean, rstd, weight, bias)
    token, *sums = (_meta(c, dtype=single) for _ in range(4))
    forward = image.unpack_norm_launch(x, token, images.permute(0, 3, 1, 2), GRID, statistics, 1e-5)
    gx, sums = rows_like(x, 4096, (p, p), c), tuple(sums)
    grads = image.unpack_norm_sums_launches(images, x, sums, GRID, statistics, 1e-5)
    apply = image.unpack_norm_grad_launch(images, x, sums[:2], gx, GRID, statistics, 1e-5, True)
    for launch in (forward, *grads, apply):
        yield f"{launch.kernel.__name__} {str(dtype).removeprefix('torch.')} C{c}", launch


def launches() -> Iterator[tuple[str, Launch]]:
    """Yield a name and a launch for every configuration of every kernel."""
    single = torch.float32
    for tile in configs.CONV:
        name = f"{tile.m}x{tile.n}x{tile.k}"
        yield f"fwd {name}", forward(tile)
        yield f"dgrad stride 2 {name}", input_gradient(tile)
        if tile.m * tile.n <= 128 * 128:  # larger ones are for 16 bit and rows in their own order
            yield f"fwd sorted {name}", forward(replace(tile, sorted=True), p=1, c=512)
            yield f"fwd tf32 {name}", forward(replace(tile, k=tile.k // 2), single)
    for tile in configs.WGRAD:
        name = f"{tile.m}x{tile.n}x{tile.k}"
        yield f"wgrad {name}", weight_gradient(tile)
        yield f"wgrad listed {name}", weight_gradient(replace(tile, sorted=True))
        if tile.k <= 64:
            yield f"wgrad tf32 {name}", weight_gradient(replace(tile, k=tile.k // 2), single)
    for tile in configs.FULL:
        name = f"{tile.m}x{tile.n}x{tile.k}"
        for kind, launch in (("fwd", forward(tile, single)), ("wgrad", weight_gradient(tile, single))):
            yield f"{kind} ieee {name}", replace(launch, constants=launch.constants | {"PRECISION": "ieee"})
    yield from stems()
    yield from memory_bound()
    yield from norms()
    yield from norms(c=3)  # no wide loads
    yield from unpacks()
    yield from unpacks(torch.float32, c=70, p=3)


def supported(launch: Launch, architectures: tuple[int, ...]) -> tuple[int, ...]:
    """Return the architectures that the engine offers a launch to: large tiles not to those before sm_90."""
    m, n, k = (launch.constants.get(f"BLOCK_{x}", 1) for x in "MNK")
    large = configs.is_large(configs.Tile(m, n, k, launch.warps, launch.stages))
    return tuple(a for a in architectures if a >= 90 or not large or "BLOCK_K" not in launch.constants)


def main() -> int:
    """Print a table of all configurations on all architectures; return the number that spill or do not fit."""
    failures = 0
    chosen = tuple(int(a) for a in sys.argv[1:]) or ARCHITECTURES
    for name, launch in launches():
        for architecture in supported(launch, chosen):
            usage = compile_launch(launch, architecture)
            good = usage.local == 0 and usage.shared <= SHARED_LIMIT[architecture]
            failures += not good
            line = f"{'ok ' if good else 'BAD'} sm_{architecture} {name:28s} {launch.warps} warps {usage}\n"
            sys.stdout.write(line)
            sys.stdout.flush()
    sys.stdout.write(f"Triton {triton.__version__}: {failures} configurations spill or do not fit\n")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
