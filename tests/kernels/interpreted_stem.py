"""Convolutions with few input channels in Triton's interpreter, against ``gather``; see ``test_triton.py``."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from patchsparse import PatchGrid, explain, pack, patch_conv2d, patch_conv_transpose2d, unpack
from patchsparse.backends import gather, triton
from patchsparse.backends.triton import stem
from patchsparse.backends.triton.launch import as_rows
from patchsparse.backends.triton.stem_configs import STEM, STEM_WGRAD
from patchsparse.geometry import Stencil

from ..matrix import rest_but
from . import interpreted_triton
from .interpreted_triton import FEW, check, normal

RULE = stem.pays
poison = interpreted_triton._poison  # uninitialised memory is NaN here, too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESNET, EFFICIENT = Stencil((7, 7), (2, 2), (3, 3)), Stencil((3, 3), (2, 2), (1, 1))


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Compute all convolutions here, also those for which it does not pay."""
    monkeypatch.setattr(stem, "pays", lambda channels, size, stencil, groups: groups == 1)


def grid_of(share: float = 0.5, seed: int = 0) -> PatchGrid:
    return PatchGrid.from_active(torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(seed)) < share)


def compare(grid: PatchGrid, channels: int, out: int, size: tuple[int, int], stencil: Stencil, dtype: torch.dtype):
    shapes = ((grid.num_active, channels, *size), (out, channels, *stencil.kernel), (out,))
    inputs = tuple(t.to(dtype) for t in normal(channels, *shapes))
    options = (stencil.stride, stencil.padding)
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, grid, *options, backend=b), 0)


@pytest.mark.parametrize(
    ("channels", "size", "stencil", "dtype"),
    rest_but(
        [(12, (8, 8), RESNET, torch.bfloat16), (5, (6, 3), Stencil((4, 5), (2, 1), (1, 2)), torch.float32)],
        [
            (12, (8, 8), RESNET, torch.bfloat16),
            (5, (6, 3), Stencil((4, 5), (2, 1), (1, 2)), torch.float32),
            (1, (16, 8), RESNET, torch.float32),
            (3, (8, 8), RESNET, torch.float16),
            (3, (8, 4), EFFICIENT, torch.bfloat16),
            (24, (4, 4), EFFICIENT, torch.float32),
            (1, (12, 8), Stencil((7, 5), (4, 4), (3, 2)), torch.bfloat16),
            (12, (4, 4), Stencil((3, 3), (1, 1), (1, 1)), torch.float16),
        ],
    ),
)
def test_stems_equal_gather(channels, size, stencil, dtype):
    compare(grid_of(), channels, 20, size, stencil, dtype)


@st.composite
def _axis(draw):
    """Draw pixels, kernel, stride and padding along one axis that map patches to patches."""
    s = draw(st.sampled_from([1, 2, 3, 4]))
    p = s * draw(st.integers(1, 6))
    k = draw(st.integers(1, 7))
    paddings = [pad for pad in range(k // 2 + 1) if k - s <= 2 * pad <= k - 1]
    assume(paddings)
    return p, k, s, draw(st.sampled_from(paddings))


@pytest.mark.rest
@given(
    axes=st.tuples(_axis(), _axis()),
    channels=st.integers(1, 16),
    out=st.sampled_from([1, 5, 24]),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.3, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
@settings(FEW, max_examples=15)
def test_any_stem_equals_gather(axes, channels, out, dtype, share, seed):
    size, kernel, stride, padding = zip(*axes, strict=True)
    stencil, grid = Stencil(kernel, stride, padding), grid_of(share, seed)
    assume(not stencil.local and not (channels == out == 1) and grid.num_active)
    compare(grid, channels, out, size, stencil, dtype)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_no_patch_one_patch_all_patches(share):
    grid = grid_of(share, seed=1)
    assert grid.num_active in (0, 1, 12)
    compare(grid, 3, 4, (4, 4), EFFICIENT, torch.float32)


@pytest.mark.parametrize(
    ("channels", "size", "stencil"),
    [(12, (8, 8), RESNET), (3, (4, 6), EFFICIENT), (5, (3, 4), Stencil((3, 3), (1, 2), (1, 1)))],
)
def test_cells_are_the_image_with_inactive_patches_empty(channels, size, stencil):
    """Bit for bit, also from memory that begins at an odd address; what a cell is filled up with is 0."""
    grid = grid_of()
    image = normal(0, (2, channels, 2 * size[0], 3 * size[1]))[0].bfloat16()
    layout = stem.cells_of(size, stencil, channels, 2)
    (down, across), (top, left) = stencil.stride, (layout.v[1], layout.h[1])
    rows = pack(image, grid).permute(0, 2, 3, 1)
    x = torch.cat((rows.new_zeros(1), rows.flatten()))[1:].view(rows.shape)
    cells = x.new_empty(grid.num_active, *layout.halo, layout.cell)
    stem.cells_launch(x, cells, grid.slot, grid.coords, layout).run()
    whole = unpack(pack(image, grid), grid).unflatten(3, (-1, across)).unflatten(2, (-1, down))
    whole = whole.permute(0, 2, 4, 3, 5, 1).flatten(3)
    whole = F.pad(whole, (0, layout.cell - whole.shape[3], left, layout.halo[1], top, layout.halo[0]))
    for n, (b, i, j) in enumerate(grid.coords.tolist()):
        v, h = i * layout.v[0], j * layout.h[0]
        assert torch.equal(cells[n], whole[b, v : v + layout.halo[0], h : h + layout.halo[1]])


@pytest.mark.parametrize("number", rest_but([2], range(len(STEM))))
def test_every_forward_tile(number):
    grid, layout = grid_of(), stem.cells_of((8, 8), RESNET, 3, 2)
    x, weight, bias = (t.half() for t in normal(1, (grid.num_active, 3, 8, 8), (40, 3, 7, 7), (40,)))
    cells, taps = x.new_empty(grid.num_active, *layout.halo, layout.cell), x.new_empty(40, 4, 4, layout.cell)
    stem.cells_launch(as_rows(x), cells, grid.slot, grid.coords, layout).run()
    stem.weight_launch(weight, taps, layout).run()
    y = x.new_empty(grid.num_active, 4, 4, 40).permute(0, 3, 1, 2)
    stem.forward_launch(cells, taps, bias, y, layout, STEM[number]).run()
    expected = gather.conv2d(x.float(), weight.float(), bias.float(), grid.slot, grid.coords, RESNET, 1)
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-3 * expected.abs().amax().item())


@pytest.mark.parametrize("number", rest_but([1], range(len(STEM_WGRAD))))
def test_every_weight_gradient_tile(number):
    grid, layout = grid_of(1.0), stem.cells_of((8, 8), RESNET, 3, 2)
    x, g = (t.half() for t in normal(2, (12, 3, 8, 8), (12, 40, 4, 4)))
    cells = x.new_empty(12, *layout.halo, layout.cell)
    stem.cells_launch(as_rows(x), cells, grid.slot, grid.coords, layout).run()
    out = x.new_empty(40, 7, 7, 3).permute(0, 3, 1, 2)
    for launch in stem.wgrad_launches(cells, as_rows(g), out, layout, STEM_WGRAD[number]):
        launch.run()
    expected = gather.conv2d_wgrad(x.float(), g.float(), grid.slot, grid.coords, RESNET, 1)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3 * expected.abs().amax().item())


def test_weight_gradient_is_deterministic_and_rows_permute():
    grid = grid_of(1.0)
    x, w, g = normal(3, (12, 3, 8, 8), (8, 3, 3, 3), (12, 8, 4, 4))
    first, second = (triton.conv2d_wgrad(x, g, grid.slot, grid.coords, EFFICIENT, 1) for _ in range(2))
    assert torch.equal(first, second)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    straight = patch_conv2d(x, w, None, grid, 2, 1, backend="triton")
    permuted = patch_conv2d(x[order], w, None, grid.permute(order), 2, 1, backend="triton")
    assert torch.equal(permuted, straight[order])


@pytest.mark.parametrize(("k", "stride"), rest_but([(4, 2)], [(4, 2), (3, 1), (8, 4)]))
def test_transposed_convolution_to_few_channels(k, stride):
    grid = grid_of()
    inputs = normal(k, (grid.num_active, 18, 3, 2), (18, 5, k, k), (5,))
    padding = (k - stride) // 2
    check(inputs, lambda b, x, w, c: patch_conv_transpose2d(x, w, c, grid, stride, padding, backend=b), 2)


def test_the_rule_and_what_explain_says(monkeypatch):
    monkeypatch.setattr(stem, "pays", RULE)
    same = Stencil((3, 3), (1, 1), (1, 1))
    for channels, size, stencil, groups, pays in (
        (12, (32, 32), RESNET, 1, True),
        (12, (8, 8), RESNET, 1, True),  # 7x7 cells for the 4x4 of the patch
        (12, (4, 4), RESNET, 1, False),  # 5x5 for 2x2
        (12, (32, 32), RESNET, 2, False),
        (32, (32, 32), RESNET, 1, False),
        (3, (32, 32), EFFICIENT, 1, True),
        (12, (32, 32), EFFICIENT, 1, False),
        (12, (32, 32), same, 1, True),
        (3, (32, 32), same._replace(padding=(2, 2), dilation=(2, 2)), 1, False),
    ):
        assert RULE(channels, size, stencil, groups) == pays, (channels, size, stencil, groups)
    grid = grid_of()
    for channels, words in ((12, "taken, space-to-depth, implicit GEMM"), (32, "taken, implicit GEMM")):
        x, w = torch.zeros(grid.num_active, channels, 8, 8), torch.zeros(64, channels, 7, 7)
        assert words in explain(patch_conv2d, x, w, None, grid, 2, 3, backend="triton")
