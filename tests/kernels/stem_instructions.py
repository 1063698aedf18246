"""Count the instructions of a warp that an output of a stem takes, 64 channels, on sm_90.

Run as ``python -m tests.kernels.stem_instructions``.
"""

import sys

import torch

from patchsparse.backends.triton import configs, conv, stem, stem_configs
from patchsparse.backends.triton.launch import Launch, rows_like
from patchsparse.backends.triton.row_tables import listed_rows, row_table
from patchsparse.geometry import Stencil

from .compiled import compile_launch
from .compiled_stem import EFFICIENT, RESNET, convolution

PIXELS, PATCHES, OUT, ACTIVE = 32, 4096, 64, 0.4


def executed(launch: Launch, passes: int) -> int:
    """Return the instructions of all warps of a program whose main loop is passed so often."""
    usage = compile_launch(launch, 90)
    again = 0 if usage.loop is None else usage.loop.total * (passes - 1)
    return (usage.instructions + again) * launch.warps


def by_cells(channels: int, stencil: Stencil) -> tuple[float, float, float]:
    """Return those of cells, forward and weight gradient."""
    layout = stem.cells_of((PIXELS, PIXELS), stencil, channels, 2)
    forward = stem_configs.stem_tiles(OUT, layout.total, 2, True)[0]
    wgrad = stem_configs.stem_wgrad_tiles(layout.total, 2, True)[0]
    launches = dict(convolution(channels, stencil, OUT, (forward, wgrad)))
    cells = executed(launches["stem cells"], 1) * launches["stem cells"].grid[1] / layout.rows
    ahead = executed(launches["stem fwd"], -(-layout.total // forward.k)) / forward.m
    loop = compile_launch(launches["stem wgrad"], 90).loop
    back = 0 if loop is None else loop.total * wgrad.warps / wgrad.k * -(-layout.total // wgrad.n)
    return cells, ahead, back


def by_rows(channels: int, stencil: Stencil) -> tuple[float, float]:
    """Return those of the general kernels, forward and weight gradient."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    grid = (meta(128, 9, 9, dtype=torch.int32), meta(PATCHES, 3, dtype=torch.int32))
    size, share = stencil.output_size((PIXELS, PIXELS)), conv.active_share((PIXELS, PIXELS), stencil, ACTIVE)
    x, weight = rows_like(meta(1), PATCHES, (PIXELS, PIXELS), channels), meta(OUT, channels, *stencil.kernel)
    y = rows_like(x, PATCHES, size, OUT)
    tile = configs.conv_tiles(PATCHES * size[0] * size[1], channels, OUT, 2, True, share)[0]
    weights = conv.forward_weights(weight.shape, 1)
    start = conv.forward_start(PATCHES * size[0] * size[1], weights, stencil.taps, "ieee", tile)
    launch = start.launch(x, weight, None, y, *row_table(*grid, (PIXELS, PIXELS), stencil, False, tile.sorted))
    ahead = executed(launch, stencil.taps * -(-channels // tile.k)) / tile.m
    tile = configs.wgrad_tiles(channels, OUT, stencil.taps, 2, True, share)[0]
    starts = conv.wgrad_starts(conv.Operand.of(x, grid[0]), y.shape, stencil, 1, tile)
    parts = meta(starts.splits, weight.numel(), dtype=torch.float32)
    maps = (*grid, (PIXELS, PIXELS), stencil)
    rows = listed_rows(*maps, tile.taps) if tile.sorted else (row_table(*maps).sources, None, None)
    loop = compile_launch(starts.partial.launch(x, y, parts, *rows), 90).loop
    passes = stencil.taps // tile.taps * -(-channels // tile.n)
    return ahead, 0 if loop is None else loop.total * tile.warps / tile.k * passes


def main() -> None:
    """Print a line for each stem."""
    same = Stencil((3, 3), (1, 1), (1, 1))
    for name, stencil in (("7x7 stride 2", RESNET), ("3x3 stride 2", EFFICIENT), ("3x3 stride 1", same)):
        for channels in (1, 3, 12, 24):
            cells, ahead, back = by_cells(channels, stencil)
            rows = by_rows(channels, stencil)
            pays = stem.pays(channels, (PIXELS, PIXELS), stencil, 1)
            sys.stdout.write(
                f"{name} C{channels}: {cells:.0f} to write cells, forward {ahead:.0f}, weight gradient {back:.0f}; "
                f"by rows {rows[0]:.0f}, {rows[1]:.0f}; taken: {'cells' if pays else 'rows'}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
