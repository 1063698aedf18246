"""The depthwise kernels in Triton's interpreter; run by ``test_triton.py``, as ``interpreted_triton.py`` is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsparse import PatchGrid, patch_conv2d, patch_max_pool2d
from patchsparse.backends import triton
from patchsparse.geometry import Stencil

from ..matrix import rest_but
from .cases import cases
from .interpreted_triton import FEW, _poison, check, normal, operands

__all__ = ["_poison"]  # a fixture that every test here uses


@pytest.mark.rest
@given(
    case=cases(kernels=(2, 3, 5), channels=(1, 3), patches=(1, 2, 3, 4), dtype=torch.float32),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
@settings(FEW, max_examples=5)
def test_depthwise_and_grouped_convolution(case, dtype):
    stencil = Stencil(case.kernel, **case.stencil)
    if stencil.local:
        return
    channels = case.image.shape[1]
    for out in (channels, 2 * channels):  # one output channel per group, and two
        inputs = operands(case, out, channels, dtype)
        options = {"groups": channels, **case.stencil}
        check(inputs, lambda b, x, w, c, o=options: patch_conv2d(x, w, c, case.grid, backend=b, **o), case.seed)


def test_depthwise_7x7_in_bfloat16():
    grid = PatchGrid.random(1, (3, 3), 0.4, torch.Generator().manual_seed(0))
    inputs = tuple(t.bfloat16() for t in normal(0, (grid.num_active, 20, 2, 2), (20, 1, 7, 7), (20,)))
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, grid, 1, 3, groups=20, backend=b), 3)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"),
    rest_but(
        [((2, 1), (13, 5), 1, 1)],  # too large for tiles
        [
            ((2, 1), (13, 5), 1, 1),
            ((4, 4), (7, 7), 1, 1),
            ((2, 8), (7, 5), 1, 1),
            ((5, 3), (3, 7), 1, 1),
            ((1, 1), (5, 5), 1, 2),
            ((4, 8), (7, 7), 2, 1),
            ((8, 4), (3, 3), 4, 1),
        ],
    ),
)
def test_depthwise_of_every_tile(size, kernel, stride, dilation):
    grid = PatchGrid.random(2, (3, 2), 0.5, torch.Generator().manual_seed(0))
    inputs = normal(1, (grid.num_active, 33, *size), (33, 1, *kernel), (33,))
    options = (stride, tuple(dilation * (k - 1) // 2 for k in kernel), dilation, 33)
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, grid, *options, backend=b), 4)


@pytest.mark.rest
def test_depthwise_weight_gradient_is_deterministic():
    grid = PatchGrid.random(3, (4, 4), 0.5, torch.Generator().manual_seed(0))
    x, g = normal(0, (grid.num_active, 20, 2, 2), (grid.num_active, 20, 2, 2))
    maps = (grid.slot, grid.coords, Stencil((7, 7), padding=(3, 3)), 20)
    first, second = (triton.conv2d_wgrad(x, g, *maps) for _ in range(2))
    assert torch.equal(first, second)


def test_max_pooling_with_a_stride_that_is_too_wide_for_tiles():
    grid = PatchGrid.random(2, (3, 2), 0.5, torch.Generator().manual_seed(0))
    inputs = normal(2, (grid.num_active, 5, 8, 8))
    check(inputs, lambda b, x: patch_max_pool2d(x, grid, (9, 1), 8, (4, 0), backend=b), 5)
