"""The convolution kernels in Triton's interpreter, with every configuration; run by ``test_triton.py``."""

from dataclasses import replace

import pytest
import torch

from patchsparse import PatchGrid, patch_conv2d
from patchsparse.backends import gather, triton
from patchsparse.backends.triton import conv, stem, tf32, tuning
from patchsparse.backends.triton.configs import CONV, CONV_SMALL, WGRAD, WGRAD_SMALL, Tile
from patchsparse.backends.triton.row_tables import listed_rows, row_table
from patchsparse.geometry import Stencil
from patchsparse.layout import packed_like

from ..matrix import rest_but
from .interpreted_triton import _poison, check, normal  # noqa: F401  the fixture works where it is imported

SAME = Stencil((3, 3), (1, 1), (1, 1), (1, 1))


def problem(p: int, c: int, dtype: torch.dtype = torch.bfloat16, k: int = 3) -> tuple:
    grid = PatchGrid.random(2, (4, 4), 0.4, torch.Generator().manual_seed(p))
    x, w, g = (t.to(dtype) for t in normal(p, (grid.num_active, c, p, p), (c, c, k, k), (grid.num_active, c, p, p)))
    return grid, x, w, g


@pytest.mark.parametrize("number", rest_but([0, 1], range(len(CONV + CONV_SMALL))))
def test_every_forward_tile(number):
    tile, ordered = (CONV + CONV_SMALL)[number], number % 2 == 0
    grid, x, w, _ = problem(2, 32)
    y = torch.empty_like(x).contiguous(memory_format=torch.channels_last)
    table = row_table(grid.slot, grid.coords, (2, 2), SAME, False, ordered)
    start = conv.forward_start(x.shape[0] * 4, conv.forward_weights(w.shape, 1), 9, tf32.precision_of(x), tile)
    start(packed_like(x), packed_like(w), None, y, *table)
    expected = gather.conv2d(x.float(), w.float(), None, grid.slot, grid.coords, SAME, 1)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().amax().item())


@pytest.mark.parametrize("number", rest_but([0, 1], range(len(WGRAD + WGRAD_SMALL))))
def test_every_weight_gradient_tile(number):
    tile, listed = (WGRAD + WGRAD_SMALL)[number], number % 2 == 0
    k = 3 if 9 % tile.taps == 0 else 4
    grid, x, w, g = problem(2, 16, k=k)
    stencil = Stencil((k, k), padding=(k // 2, k // 2))
    out = torch.empty_like(w).contiguous(memory_format=torch.channels_last)
    starts = conv.wgrad_starts(conv.Operand.of(x, grid.slot), g.shape, stencil, 1, tile, splits=2)
    maps = (grid.slot, grid.coords, (2, 2), stencil)
    rows = listed_rows(*maps, tile.taps) if listed else (row_table(*maps).sources, None, None)
    parts = torch.empty(2, out.numel())
    starts.partial(packed_like(x), packed_like(g), parts, *rows)
    starts.total(parts, out)
    expected = gather.conv2d_wgrad(x.float(), g.float(), grid.slot, grid.coords, stencil, 1)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2 * expected.abs().amax().item())


# Patch, kernel, stride, groups, channels per group in and out, and configuration: blocks that end inside of the
# channels, several blocks of the sum, more taps than 31, parts and tiles without rows, one part written at once.
CASES = {
    "sorted, odd channels": (1, 3, 1, 1, 17, 9, Tile(32, 16, 16, 4, 2, True), 2),
    "three taps at once": (2, 3, 1, 2, 20, 24, Tile(16, 32, 16, 4, 2, taps=3), 1),
    "listed, three taps at once": (1, 3, 1, 1, 16, 33, Tile(16, 16, 16, 4, 2, True, taps=3), 3),
    "listed, all taps at once": (2, 3, 2, 1, 18, 16, Tile(32, 16, 16, 4, 2, True, taps=9), 2),
    "stride 2, by position": (4, 3, 2, 2, 8, 16, Tile(32, 16, 16, 4, 2), 40),
    "stride 2, four taps": (2, 4, 2, 1, 5, 40, Tile(16, 16, 16, 4, 2, True, taps=4), 1),
    "49 taps": (1, 7, 1, 1, 16, 16, Tile(16, 16, 16, 4, 2, True, taps=7), 2),
    "49 taps in order": (2, 7, 1, 1, 3, 4, Tile(16, 16, 16, 4, 2, taps=7), 1),
}


@pytest.mark.parametrize("name", rest_but(list(CASES)[:3], list(CASES)))
@pytest.mark.parametrize("keep", rest_but([0.4], [0.4, 1, 9]))
def test_configurations_that_no_default_takes(name, keep, monkeypatch):
    p, k, stride, groups, c_in, c_out, tile, splits = CASES[name]
    monkeypatch.setattr(conv, "conv_tiles", lambda *_: (replace(tile, taps=1),))
    monkeypatch.setattr(conv, "wgrad_tiles", lambda *_: (tile,))
    monkeypatch.setattr(conv, "_splits", lambda *_: splits)
    monkeypatch.setattr(stem, "pays", lambda *_: False)
    grid = PatchGrid.random(2, (3, 3), keep, torch.Generator().manual_seed(0))
    shapes = ((grid.num_active, groups * c_in, p, p), (groups * c_out, c_in, k, k), (groups * c_out,))
    options = (stride, (k - 1) // 2, 1, groups)
    check(normal(5, *shapes), lambda b, x, w, c: patch_conv2d(x, w, c, grid, *options, backend=b), 9)


def test_weight_gradient_is_deterministic_and_rows_permute():
    grid, x, w, g = problem(2, 32, torch.float32)
    first, second = (
        triton.conv2d_wgrad(x, g, grid.slot, grid.coords, Stencil((3, 3), padding=(1, 1)), 1) for _ in range(2)
    )
    assert torch.equal(first, second)
    order = torch.randperm(grid.num_active, generator=torch.Generator().manual_seed(0))
    straight = patch_conv2d(x, w, None, grid, 1, 1, backend="triton")
    permuted = patch_conv2d(x[order], w, None, grid.permute(order), 1, 1, backend="triton")
    torch.testing.assert_close(permuted, straight[order], rtol=1e-5, atol=1e-5)


def test_rounding_to_the_ten_bits_of_tf32():
    ulp = 2.0**-10
    x = torch.tensor([1 + 0.49 * ulp, 1 + 0.5 * ulp, -1 - 0.75 * ulp, 0.0, -0.0, 3.0e-39, float("inf"), -float("inf")])
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)  # NaN, whose sums with a half would carry over
    x, y = torch.cat([x, bits.view(torch.float32), normal(0, (2000,))[0]]), torch.empty(2011)
    tf32.rounding_start(2011, x.device)(x, y)
    assert y[:5].tolist() == [1, 1 + ulp, -1 - ulp, 0, 0]
    assert torch.equal(y[6:8], x[6:8])
    assert y[8:11].isnan().all()
    assert torch.equal(y[11:].view(torch.int32) & 0x1FFF, torch.zeros(2000, dtype=torch.int32))
    assert ((y[11:] - x[11:]).abs() <= x[11:].abs() * ulp / 2).all()


@pytest.mark.rest
def test_tuned_convolution_equals_the_default(monkeypatch):
    few = conv.conv_tiles
    monkeypatch.setattr(conv, "conv_tiles", lambda *a: few(*a)[:3])
    grid, x, w, _ = problem(1, 32)
    x, w = x.half(), w.half()
    before = patch_conv2d(x, w, None, grid, 1, 1, backend="triton")
    with tuning.tune(repetitions=1) as tuner:
        known = len(tuner.found)
        after = patch_conv2d(x, w, None, grid, 1, 1, backend="triton")
    assert len(tuner.found) == known + 1
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
