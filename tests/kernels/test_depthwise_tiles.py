"""The plan of the depthwise kernels of the Triton engine: every product once, in tiles that fit."""

import pytest

from patchsparse.geometry import Stencil

pool = pytest.importorskip("patchsparse.backends.triton.depthwise_pool", reason="Triton is not installed")
plan = pytest.importorskip("patchsparse.backends.triton.depthwise_plan")

SAME7 = Stencil((7, 7), (1, 1), (3, 3))
CASES = [
    ((8, 8), (8, 8), SAME7, False),
    ((4, 4), (4, 4), SAME7, True),
    ((1, 1), (1, 1), Stencil((5, 3), (1, 1), (4, 2), (2, 2)), False),
    ((3, 2), (3, 2), SAME7, False),
    ((8, 4), (4, 2), Stencil((7, 3), (2, 2), (3, 1)), False),
    ((4, 2), (8, 4), Stencil((7, 3), (2, 2), (3, 1)), True),
    ((2, 1), (8, 4), Stencil((5, 5), (4, 4), (2, 2)), True),
]


def _read_by(target: int, axis: tuple) -> set[tuple[int, int]]:
    """Return ``(tap, source pixel)`` of a target pixel by the definition of a convolution, and of its transpose."""
    _, _, taps, stride, padding, dilation, _, transposed = axis
    if not transposed:
        return {(tap, target * stride - padding + tap * dilation) for tap in range(taps)}
    found = {(tap, target + padding - tap * dilation) for tap in range(taps)}
    return {(tap, at // stride) for tap, at in found if at % stride == 0}


@pytest.mark.parametrize(("source", "target", "stencil", "transposed"), CASES)
def test_products_of_a_tile_are_those_of_the_convolution(source, target, stencil, transposed):
    tile = pool.tile_of_pixels(source, target, stencil, transposed, 64)
    v, h, width = tile.v, tile.h, source[1]
    found = []
    for n, down in enumerate(plan.away(v)):
        for m, right in enumerate(plan.away(h)):
            rows = plan.pixels(v, h, n, m)
            assert len(set(rows)) == len(rows)
            flat = plan.products(v, h, n, m)
            triples = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
            assert [t[0] for t in triples] == sorted(t[0] for t in triples)  # so that each weight is read once
            assert {t[2] for t in triples} == set(range(len(rows)))  # nothing is read in vain
            for tap, pixel, index in triples:
                at = (down * plan.source_side(v) + rows[index] // width, right * plan.source_side(h))
                found.append((tap, pixel, at[0], at[1] + rows[index] % width))
    expected = [
        (i * stencil.kernel[1] + j, y * h[6] + x, a, b)
        for y in range(v[6])
        for x in range(h[6])
        for i, a in _read_by(y, v)
        for j, b in _read_by(x, h)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("weight_gradient", [False, True])
@pytest.mark.parametrize("channels", [1, 24, 64, 96, 192, 384, 768])
@pytest.mark.parametrize(("source", "target", "stencil", "transposed"), CASES)
def test_tiles_divide_patches_and_fit_the_registers(source, target, stencil, transposed, channels, weight_gradient):
    tile = pool.tile_of_pixels(source, target, stencil, transposed, channels, weight_gradient)
    for axis in (tile.v, tile.h):
        assert axis[1] % axis[6] == 0
        assert axis[0] % plan.source_side(axis) == 0
    values = max(tile.v[6] * tile.h[6], plan.source_side(tile.v) * plan.source_side(tile.h))
    assert values * tile.channels <= pool.MOST_VALUES * pool.LANES
    assert tile.channels * stencil.taps <= 64 * 64 or not weight_gradient
    idle = -channels % tile.channels
    assert idle < 64
    assert tile.count(10) * tile.v[6] * tile.h[6] == 10 * target[0] * target[1]


def test_large_kernels_and_wide_strides_have_no_tile():
    assert pool.tile_of_pixels((8, 8), (8, 8), Stencil((9, 9), (1, 1), (4, 4)), False, 64) is None
    assert pool.tile_of_pixels((8, 8), (1, 1), Stencil((7, 7), (8, 8), (0, 0)), False, 64) is None
