"""Compile every shipped kernel configuration ahead of time, without a GPU, and read what ptxas made of it.

Run as ``python -m tests.kernels.compiled`` for the whole table: all kernels and configurations on all architectures,
or on those named, such as ``90``.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patchsparse.backends.triton import configs, conv, norm, tf32
from patchsparse.backends.triton import depthwise_pool as pool
from patchsparse.backends.triton import norm_unpack as image
from patchsparse.backends.triton.launch import Launch, rows_like
from patchsparse.backends.triton.row_tables import listed_rows, row_table
from patchsparse.geometry import Stencil

from .compiled_row_tables import row_table_launches
from .compiled_stem import stems
from .machine_code import Loop, main_loop, resources

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# KB of shared memory that one program may take, and of a multiprocessor (CUDA C++ Programming Guide, table of technical
# specifications per compute capability), and warps that share a multiprocessor.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SHARED_TOTAL = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        registers: per thread.
        local: bytes of local memory per thread (spills).
        shared: bytes of shared memory per program.
        products: matrix instructions in all.
        pending: copies still in flight while a step of the main loop waits for its operands.
        programs: that share a multiprocessor.
        instructions: of the whole kernel.
        loop: instructions of the main loop, for each step and warp; None if no loop multiplies or all is unrolled.
    """

    registers: int
    local: int
    shared: int
    products: int
    pending: int
    programs: int
    instructions: int
    loop: Loop | None

    def __str__(self) -> str:
        line = f"{self.registers} registers, {self.shared / 1024:.0f} KB, {self.programs} programs, "
        line += f"{self.instructions} instructions"
        if self.loop is None:
            return line
        s = self.loop
        return (
            f"{line}, a step: {s.total}, {s.matrix} matrix, {s.fused} fused, {s.copies} copies of 16 "
            f"bytes, {s.loads} loads, {s.shared} shared, {s.other} other"
        )


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
    registers, local = resources(compiled.asm["cubin"])
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * launch.warps)
    by_memory = SHARED_TOTAL[architecture] // (shared + 1024)  # the driver keeps 1 KB for each program
    programs = min(by_registers, by_memory, WARPS[architecture] // launch.warps)
    counts = main_loop(compiled.asm["cubin"])
    return Usage(registers, local, shared, products, max(waits, default=0), programs, *counts)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


GRID = (_meta(128, 9, 9, dtype=torch.int32), _meta(4096, 3, dtype=torch.int32))  # slot, coords: 9x9, 32 visible
SAME3, SAME7 = (Stencil((k, k), (1, 1), (k // 2, k // 2), (1, 1)) for k in (3, 7))
STRIDED = Stencil((3, 3), (2, 2), (1, 1), (1, 1))


def forward(tile: configs.Tile, dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 2) -> Launch:
    """Return the launch of a 3x3 convolution of ``c`` channels."""
    x, w = rows_like(_meta(1, dtype=dtype), 4096, (p, p), c), _meta(c, c, 3, 3, dtype=dtype)
    start = conv.forward_start(4096 * p * p, conv.forward_weights(w.shape, 1), 9, tf32.precision_of(x), tile)
    return start.launch(x, w, _meta(c, dtype=dtype), x, *row_table(*GRID, (p, p), SAME3, False, tile.sorted))


def input_gradient(
    tile: configs.Tile, dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 4, stencil: Stencil = STRIDED
) -> Launch:
    """Return the launch of the input gradient, at stride 2 with the transposed table."""
    straight, one = stencil.stride == (1, 1), _meta(1, dtype=dtype)
    g, y = rows_like(one, 4096, stencil.output_size((p, p)), c), rows_like(one, 4096, (p, p), c)
    w = _meta(c, c, 3, 3, dtype=dtype)
    weights = conv.transposed_weights(w.shape, 1, straight)
    start = conv.forward_start(4096 * p * p, weights, 9, tf32.precision_of(g), tile)
    return start.launch(g, w, None, y, *row_table(*GRID, (p, p), stencil, not straight, tile.sorted))


def weight_gradient(tile: configs.Tile, dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 2) -> Launch:
    """Return the launch of the weight gradient of a 3x3 (of four taps at once: 4x4) convolution of ``c`` channels."""
    k = 3 if 9 % tile.taps == 0 else 4
    stencil = Stencil((k, k), (1, 1), (k // 2, k // 2), (1, 1))
    x, w = rows_like(_meta(1, dtype=dtype), 4096, (p, p), c), _meta(c, c, k, k, dtype=dtype)
    splits, partial, _ = conv.wgrad_starts(conv.Operand.of(x, GRID[0]), x.shape, stencil, 1, tile)
    parts = w if splits == 1 else _meta(splits, w.numel(), dtype=torch.float32)
    maps = (*GRID, (p, p), stencil)
    rows = listed_rows(*maps, tile.taps) if tile.sorted else (row_table(*maps).sources, None, None)
    return partial.launch(x, x, parts, *rows)


def memory_bound(c: int = 128, p: int = 8) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of pooling."""
    x = _meta(4096, p, p, c)
    y, half = rows_like(x, 4096, (p, p), c), rows_like(x, 4096, (p // 2, p // 2), c)
    tap = torch.empty_like(half, dtype=torch.uint8)
    yield "max-pool", pool.pool_launch(x, half, tap, *GRID, STRIDED)
    rows, taps = half.permute(0, 2, 3, 1), tap.permute(0, 2, 3, 1)
    yield "max-pool grad", pool.pool_grad_launch(rows, taps, y, *GRID, STRIDED)


def depthwise(p: int, c: int, k: int = 7, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of depthwise convolution, of its gradients and of the sum over parts."""
    x, w = _meta(4096, p, p, c, dtype=dtype), _meta(c, 1, k, k, dtype=dtype)
    y, stencil = rows_like(x, 4096, (p, p), c), Stencil((k, k), (1, 1), (k // 2, k // 2), (1, 1))
    name, values = "depthwise" if k < 9 else "depthwise large", f"{str(dtype).removeprefix('torch.')} C{c}"
    yield f"{name} {values}", pool.depthwise_launch(x, w, _meta(c, dtype=dtype), y, *GRID, stencil, False)
    yield f"{name} dgrad {values}", pool.depthwise_launch(x, w, None, y, *GRID, stencil, True)
    partial, total = pool.depthwise_wgrad_launches(x, x, w, *GRID, stencil)
    yield f"{name} wgrad {values}", partial
    yield f"sum of parts {values}", total


def norms(c: int = 256, p: int = 4) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of fused batch normalisation, with residual and ReLU."""
    x = rows_like(_meta(4096, p, p, c), 4096, (p, p), c)
    mean, var, *sums = (_meta(c, dtype=torch.float32) for _ in range(4))
    statistics = (mean, var, _meta(c), _meta(c))
    types, options = norm.types_of(x, x, *statistics), (1e-5, "relu", 0.01)
    moments = norm.moments_starts(x.shape, x.device, x.dtype)
    parts = _meta(2, moments.splits, c, dtype=torch.float32)
    running = norm.running_start(c, x.device, norm.types_of(mean, var, *sums, None), 1.1, 0.1)
    grads = norm.grad_starts(x.shape, x.device, (x.dtype, *types), options, True)
    apply = norm.apply_start(x.shape, x.device, types, (1e-5, "silu", 0.01))
    sums_parts = _meta(2, grads.splits, c, dtype=torch.float32)
    for launch in (
        moments.some.launch(x, parts),
        moments.combine.launch(parts, mean, var),
        running.launch(mean, var, *sums, _meta(dtype=torch.int64)),
        apply.launch(x, x, x, *statistics),
        grads.sums.launch(x, x, x, x, sums_parts, *statistics),
        grads.total.launch(sums_parts, *sums, sums[1]),
        grads.apply.launch(x, x, None, x, *sums, *statistics),
    ):
        yield f"{launch.kernel.__name__} C{c}", launch
    yield f"norm_grad_apply_kernel of a residual C{c}", grads.apply.launch(x, None, x, x, *sums, *statistics)


def unpacks(dtype: torch.dtype = torch.bfloat16, c: int = 256, p: int = 4) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of batch normalisation fused with ``unpack``; 40 % of 128 images of 9x9 patches are active."""
    x = rows_like(_meta(4096, p, p, c, dtype=dtype), 4096, (p, p), c)
    images = rows_like(x, 128, (9 * p, 9 * p), c)
    mean, var, weight, bias, token, *sums = (_meta(c, dtype=torch.float32) for _ in range(8))
    slot, coords = GRID
    types = norm.types_of(x, token, mean, var, weight, bias)
    forward = image.unpack_start(x.shape, slot.shape, x.device, types, 1e-5)
    types = norm.types_of(images, x, mean, var, weight)
    grads = image.unpack_grad_starts(x.shape, slot.shape, x.device, types, 1e-5, True)
    parts = _meta(3, grads.splits, c, dtype=torch.float32)
    for launch in (
        forward.launch(x, token, images, slot, mean, var, weight, bias),
        grads.sums.launch(images, x, slot, parts, mean, var),
        grads.total.launch(parts, *sums),
        grads.apply.launch(images, x, x, coords, *sums[:2], mean, var, weight),
    ):
        yield f"{launch.kernel.__name__} {str(dtype).removeprefix('torch.')} C{c}", launch


def _named(kind: str, tile: configs.Tile) -> str:
    taps = f" {tile.taps} taps" if tile.taps > 1 else ""
    return f"{kind}{' sorted' if tile.sorted else ''} {tile.m}x{tile.n}x{tile.k}{taps} {tile.stages} stages"


def convolutions(architecture: int) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of convolutions for every configuration that the engine offers on an architecture."""
    single, card = torch.float32, (SHARED_LIMIT[architecture], architecture)
    shapes = [(c_in, c_out, share) for c_in in (512, 64, 17) for c_out in (512, 64, 32, 16) for share in (1.0, 0.5)]
    for kind, dtype, tensor_cores in (("", torch.bfloat16, True), (" tf32", single, True), (" ieee", single, False)):
        options = (dtype.itemsize, tensor_cores)
        tiles = [t for i, o, s in shapes for t in configs.conv_tiles(1 << 20, i, o, *options, s, *card)]
        for tile in dict.fromkeys(tiles):
            c = 17 if tile.k < 32 // dtype.itemsize else max(tile.n, 64)
            launch = forward(tile, dtype, c)
            yield _named("fwd" + kind, tile), _precisely(launch, tensor_cores)
            if tile.sorted:
                yield _named(f"dgrad{kind} stride 2", tile), _precisely(input_gradient(tile, dtype, c), tensor_cores)
            else:
                gradient = input_gradient(tile, dtype, c, stencil=SAME3)
                yield _named("dgrad" + kind, tile), _precisely(gradient, tensor_cores)
        tiles = [t for i, o, s in shapes for k in (9, 16) for t in configs.wgrad_tiles(o, i, k, *options, s, *card)]
        for tile in dict.fromkeys(tiles):
            launch = weight_gradient(tile, dtype, max(tile.n, 64))
            yield _named("wgrad" + kind, tile), _precisely(launch, tensor_cores)
    tile = configs.conv_tiles(1 << 20, 17, 17, 2, True, 1.0, *card)[0]
    yield _named("fwd C17", tile), forward(tile, c=17)  # no wide copies
    tile = configs.wgrad_tiles(17, 17, 9, 2, True, 1.0, *card)[0]
    yield _named("wgrad C17", tile), weight_gradient(tile, c=17)
    yield "rounding to TF32", tf32.rounding_start(4096, torch.device("meta")).launch(*[_meta(4096, dtype=single)] * 2)


def _precisely(launch: Launch, tensor_cores: bool) -> Launch:
    """Return a launch with plain multiply-adds unless it may use tensor cores."""
    return launch if tensor_cores else replace(launch, constants=launch.constants | {"PRECISION": "ieee"})


def launches(architecture: int) -> Iterator[tuple[str, Launch]]:
    """Yield a name and a launch for every configuration of every kernel that is offered on an architecture."""
    yield from convolutions(architecture)
    yield from stems()
    yield from row_table_launches()
    yield from memory_bound()
    for p, c in ((1, 768), (2, 384), (4, 192), (8, 96)):
        yield from depthwise(p, c)
    yield from depthwise(4, 70, dtype=torch.float32)
    yield from depthwise(4, 192, k=9)
    yield from norms()
    yield from norms(c=3)  # no wide loads
    yield from unpacks()
    yield from unpacks(torch.float32, c=70, p=3)


def main() -> int:
    """Print a table of all configurations on all architectures; return the number that spill or do not fit."""
    failures = 0
    for architecture in tuple(int(a) for a in sys.argv[1:]) or ARCHITECTURES:
        for name, launch in launches(architecture):
            usage = compile_launch(launch, architecture)
            good = usage.local == 0 and usage.shared <= SHARED_LIMIT[architecture]
            failures += not good
            line = f"{'ok ' if good else 'BAD'} sm_{architecture} {name:36s} {launch.warps} warps, {usage}"
            sys.stdout.write(f"{line}{'' if good else f', {usage.local} bytes spilled'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"Triton {triton.__version__}: {failures} configurations spill or do not fit\n")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
