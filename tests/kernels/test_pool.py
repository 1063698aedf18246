"""Pooling of every engine against pooling of the zero-filled image."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from patchsparse import PatchGrid, pack, patch_avg_pool2d, patch_max_pool2d

from .cases import cases, packed_of, upsampled
from .test_conv import ENGINES, gradients

POOLS = {"kernels": (1, 2, 3, 5), "channels": (1, 3, 17)}


def masked(case):
    """Return the image leaf and the zero-filled image; skip images that a stencil can miss altogether."""
    extents = [d * (k - 1) for k, d in zip(case.kernel, case.stencil["dilation"], strict=True)]
    assume(all(size > extent for size, extent in zip(case.image.shape[2:], extents, strict=True)))
    assume(all(2 * p <= k for k, p in zip(case.kernel, case.stencil["padding"], strict=True)))
    image = case.image.clone().requires_grad_()
    return image, torch.where(upsampled(case.grid.active, *image.shape[2:]), image, 0)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("rectified", [False, True])
@given(case=cases(**POOLS))
def test_max_pool_equals_pooling_the_zero_filled_image(backend, rectified, case):
    """Inactive neighbours win over negative values; ties go to the first tap, so after a ReLU zeros tie often."""
    image, zero_filled = masked(case)
    if rectified:
        zero_filled = zero_filled.relu()
    packed = packed_of(zero_filled, case.grid.active)
    stride, padding, dilation = case.stencil["stride"], case.stencil["padding"], case.stencil["dilation"]
    dense = F.max_pool2d(zero_filled, case.kernel, stride, padding, dilation)
    expected = packed_of(dense, case.grid.active)
    actual = patch_max_pool2d(packed, case.grid, case.kernel, stride, padding, dilation, backend=backend)
    assert torch.equal(actual, expected)
    for a, e in zip(gradients(actual, (image,), 0), gradients(expected, (image,), 0), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ENGINES)
def test_a_stencil_that_lies_around_the_image_gives_the_border(backend):
    """Taps to the left and right of an image one pixel wide: nothing but the border is read."""
    grid = PatchGrid.from_active(torch.tensor([[[True], [False], [True]]]))
    packed = torch.randn(2, 33, 1, 1, requires_grad=True)
    pooled = patch_max_pool2d(packed, grid, (3, 2), 1, (1, 1), (1, 2), backend=backend)
    assert torch.equal(pooled, torch.full((2, 33, 1, 1), -torch.inf))
    assert not gradients(pooled, (packed,), 0)[0].any()


@pytest.mark.parametrize("backend", ENGINES)
def test_ties_send_the_gradient_to_the_first_tap(backend):
    grid = PatchGrid.from_active(torch.tensor([[[True, False], [True, True]]]))
    image = torch.randint(-1, 2, (1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    image = torch.where(upsampled(grid.active, 8, 8), image, 0).requires_grad_()
    expected = packed_of(F.max_pool2d(image, 3, 2, 1), grid.active)
    actual = patch_max_pool2d(pack(image, grid), grid, 3, 2, 1, backend=backend)
    seen = upsampled(grid.active, 8, 8)
    wanted = torch.where(seen, gradients(expected, (image,), 3)[0], 0)
    torch.testing.assert_close(gradients(actual, (image,), 3)[0], wanted)


@given(case=cases(dilations=(1,), **POOLS), count_include_pad=st.booleans(), divisor=st.sampled_from([None, 5]))
def test_avg_pool_equals_pooling_the_zero_filled_image(case, count_include_pad, divisor):
    image, zero_filled = masked(case)
    stride, padding = case.stencil["stride"], case.stencil["padding"]
    options = {"count_include_pad": count_include_pad, "divisor_override": divisor}
    dense = F.avg_pool2d(zero_filled, case.kernel, stride, padding, False, **options)
    expected = packed_of(dense, case.grid.active)
    actual = patch_avg_pool2d(pack(image, case.grid), case.grid, case.kernel, stride, padding, **options)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(gradients(actual, (image,), 0), gradients(expected, (image,), 0), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ENGINES)
def test_ceil_mode_where_it_keeps_patches_whole(backend):
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 3, 12, 12)
    image = torch.where(upsampled(grid.active, 12, 12), image, 0)
    expected = packed_of(F.max_pool2d(image, 3, 2, 0, ceil_mode=True), grid.active)
    actual = patch_max_pool2d(pack(image, grid), grid, 3, 2, 0, ceil_mode=True, backend=backend)
    assert torch.equal(actual, expected)


def test_a_window_that_does_not_map_patches_to_patches_is_named():
    grid = PatchGrid.random(1, (2, 2), keep=2)
    packed = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"patch_max_pool2d: kernel 3, stride 2, padding 0"):
        patch_max_pool2d(packed, grid, 3, 2, 0)
    with pytest.raises(ValueError, match="stride 3 does not divide the patch height of 4"):
        patch_avg_pool2d(packed, grid, 3, 3)
    with pytest.raises(ValueError, match="at most 255"):
        patch_max_pool2d(torch.zeros(2, 1, 32, 32), grid, 17, 1, 8)
