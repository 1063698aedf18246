"""Where a region lies, what shape it has, and what is cropped of an image for it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsparse import PatchGrid
from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.patch_loss import contrast, normalise_patches, patch_errors, patch_statistics
from spatspark_fast.models.region import Extent, Region, crop, draw_region, region_shape
from spatspark_fast.models.spark import build_spark

from .parity import make_frames


@pytest.mark.parametrize(
    ("grid", "share", "shape"),
    [
        ((9, 9), 0.25, (4, 5)), ((9, 9), 0.37, (5, 6)), ((9, 9), 0.5, (6, 7)), ((6, 6), 0.25, (3, 3)),
        ((3, 12), 0.25, (3, 3)), ((12, 3), 0.5, (6, 3)), ((1, 8), 0.5, (1, 4)), ((2, 2), 0.01, (1, 1)),
        ((5, 7), 0.999, (5, 7)), ((16, 24), 0.25, (10, 10)),
    ],
)  # fmt: skip
def test_a_region_is_near_square_and_of_about_the_share(grid, share, shape) -> None:
    assert region_shape(grid, share) == shape


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), share=st.floats(0.01, 1.0))
def test_a_region_fits_its_image_and_is_never_far_from_the_share(rows: int, columns: int, share: float) -> None:
    r, c = region_shape((rows, columns), share)
    assert 1 <= r <= rows
    assert 1 <= c <= columns
    wanted = max(share * rows * columns, 1)
    assert abs(math.log(r * c / wanted)) <= math.log(2) + 1e-9
    if share == 1.0:
        assert (r, c) == (rows, columns)


def test_regions_are_drawn_in_proportion_to_what_their_patches_are_worth() -> None:
    torch.manual_seed(0)
    worth, draws, shape = torch.rand(4, 5) + 0.1, 40_000, (2, 3)
    place = ((torch.arange(draws) + 0.5) / draws)[:, None]
    region = draw_region(worth.expand(draws, 4, 5), place, shape, patch=32)
    found = torch.zeros(3, 3).index_put_(tuple(region.first.unbind(1)), torch.ones(draws), accumulate=True) / draws
    sums = torch.stack([torch.stack([worth[y : y + 2, x : x + 3].sum() for x in range(3)]) for y in range(3)])
    torch.testing.assert_close(found, sums / sums.sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", [0.0, 1 - 2**-24])
def test_the_first_and_the_last_place_lie_inside(place: float) -> None:
    region = draw_region(torch.full((3, 4, 5), 1e-3), torch.full((3, 1), place), (2, 2), patch=32)
    assert region.first.tolist() == [[0, 0] if place == 0 else [2, 3]] * 3


def test_a_step_draws_regions_where_masked_patches_have_rain() -> None:
    """One wet corner, hidden or seen: with the loss on masked patches it draws regions only where it is hidden."""
    frames = torch.zeros(400, 3, 192, 192)
    frames[:, :, :64, :64] = torch.rand(400, 3, 64, 64)
    model = build_spark("resnet10t", in_chans=3, decoder_width=32)
    grid, region = masks_of_step(model, MaskSampler(0.6), frames, share=0.1)
    assert isinstance(region, Region)
    assert region.shape == (2, 2)
    hidden = 4 - grid.active[:, :2, :2].flatten(1).sum(1)
    there = (region.first == 0).all(1)
    assert there[hidden == 0].float().mean() < 0.1
    assert there[hidden >= 3].float().mean() > 0.15
    model.loss_on = "all"
    _, region = masks_of_step(model, MaskSampler(0.6), frames, share=0.1)
    assert isinstance(region, Region)
    assert (region.first == 0).all(1)[hidden == 0].float().mean() > 0.15


def test_contrast_is_the_error_of_each_patch_s_mean() -> None:
    frames = make_frames(2, 64, 96)
    frames[0, :, :32, :32] = 0.05  # 3 mm in 5 minutes, and no contrast
    frames[0, :, :32, 32:64] *= 1e-3  # as little as the floor
    blank = patch_errors(torch.zeros_like(frames), frames, (2, 3))
    # The normalisation takes the unbiased variance, a share of 1 / (3 * 32 * 32 - 1) larger.
    torch.testing.assert_close(contrast(frames, (2, 3)), blank, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(contrast(frames.float(), (2, 3)), blank.float(), rtol=1e-3, atol=2e-3)
    assert normalise_patches(frames, patch_statistics(frames, (2, 3)))[0, :, :32, :32].abs().max() < 1e-12
    assert contrast(frames, (2, 3))[0, 0, 0] < 1e-9


@settings(max_examples=30)
@given(data=st.data())
def test_crop_takes_the_pixels_of_an_extent_and_gives_their_gradients_back(data: st.DataObject) -> None:
    grid = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.integers(1, side)) for side in grid)
    first = [[data.draw(st.integers(0, g - s)) for g, s in zip(grid, shape, strict=True)] for _ in range(2)]
    stride, around = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(0, 5))
    region = Region(torch.tensor(first), (shape[0], shape[1]), grid, 8)
    side = 8 // stride
    image = torch.randn(2, 3, side * grid[0], side * grid[1], dtype=torch.double, requires_grad=True)
    extent = region.extent(stride, around)
    found = crop(image, region.whole(stride), extent)
    wanted = []
    for number, start in enumerate(first):
        cuts = []
        for axis in (0, 1):
            length = min(shape[axis] * side + 2 * around, grid[axis] * side)
            begin = min(max(start[axis] * side - around, 0), grid[axis] * side - length)
            cuts.append(slice(begin, begin + length))
        wanted.append(image[number, :, cuts[0], cuts[1]])
    assert torch.equal(found, torch.stack(wanted))
    assert found.shape[2:] == extent.size
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), image)[0] for x in (found, torch.stack(wanted)))
    assert torch.equal(ours, theirs)


def test_crop_goes_from_one_extent_to_a_smaller_one() -> None:
    region = Region(torch.tensor([[0, 2], [1, 0]]), (1, 1), (3, 4), 8)
    image = torch.randn(2, 5, 24, 32)
    large, small = region.extent(1, 3), region.extent(1, 1)
    assert isinstance(large, Extent)
    there = crop(crop(image, region.whole(), large), large, small)
    assert torch.equal(there, crop(image, region.whole(), small))
    assert torch.equal(crop(image, region.whole(), region.whole()), image)


def test_the_patches_of_a_region() -> None:
    active = torch.rand(2, 3, 4) < 0.5
    grid = PatchGrid.from_active(active | (torch.arange(12).view(3, 4) == 5))
    region = Region(torch.tensor([[0, 2], [1, 1]]), (2, 2), (3, 4), 8)
    inside = region.patches(grid.active)
    assert torch.equal(inside, torch.stack([grid.active[0, 0:2, 2:4], grid.active[1, 1:3, 1:3]]))
