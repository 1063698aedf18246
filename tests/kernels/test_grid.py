"""PatchGrid: counts, coordinates, slots, determinism, errors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchsparse import PatchGrid

from .dispatched import Dispatched


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_random_keeps_the_rounded_share_of_every_image(batch, rows, columns, keep, seed):
    grid = PatchGrid.random(batch, (rows, columns), keep, generator=torch.Generator().manual_seed(seed))
    assert grid.counts().tolist() == [round(rows * columns * keep)] * batch
    assert grid.num_active == int(grid.active.sum())


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_slot_and_coords_are_inverse_of_each_other(batch, rows, columns, seed):
    active = torch.rand(batch, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    grid = PatchGrid.from_active(active)
    image, row, column = grid.coords.long().unbind(1)
    assert torch.equal(grid.slot[image, row, column], torch.arange(grid.num_active, dtype=torch.int32))
    assert torch.equal(grid.slot >= 0, active)
    assert torch.equal(grid.image, image)
    complement = grid.complement()
    assert torch.equal(complement.active, ~active)
    assert grid.num_active + complement.num_active == active.numel()


def test_random_and_from_active_agree_on_the_row_order():
    drawn = PatchGrid.random(3, (4, 5), keep=7, generator=torch.Generator().manual_seed(0))
    rebuilt = PatchGrid.from_active(drawn.active)
    assert torch.equal(drawn.coords, rebuilt.coords)
    assert torch.equal(drawn.slot, rebuilt.slot)
    assert torch.equal(drawn.complement().coords, rebuilt.complement().coords)


def test_random_repeats_with_its_generator():
    def draw(seed):
        return PatchGrid.random(2, (9, 9), 0.4, generator=torch.Generator().manual_seed(seed)).active

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_is_uniform_over_patches():
    active = PatchGrid.random(4000, (3, 3), keep=3, generator=torch.Generator().manual_seed(0)).active
    share = active.float().mean(0)
    assert (share - 1 / 3).abs().max() < 4 * (2 / 9 / 4000) ** 0.5


def test_from_scores_keeps_the_highest():
    scores = torch.tensor([[[0.1, 0.9], [0.5, 0.3]], [[4.0, 1.0], [2.0, 3.0]]])
    grid = PatchGrid.from_scores(scores, keep=2)
    assert grid.active.tolist() == [[[False, True], [True, False]], [[True, False], [False, True]]]


def test_a_mask_is_drawn_by_few_operators_and_none_waits_for_values():
    scores = torch.rand(3, 4, 5)
    with Dispatched() as dispatched:
        PatchGrid.from_scores(scores, 0.4)
    kernels = [name for name in dispatched.names if name != "view"]
    assert len(kernels) <= 11, kernels
    assert not {"nonzero", "_local_scalar_dense", "item"} & set(kernels)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 1)])
def test_pixels_are_those_of_active_patches(height, width):
    grid = PatchGrid.random(3, (2, 3), keep=2, generator=torch.Generator().manual_seed(0))
    pixels = grid.pixels((2 * height, 3 * width))
    assert pixels.dtype == torch.bool
    assert pixels.shape == (3, 2 * height, 3 * width)
    for image, row, column in itertools.product(range(3), range(2 * height), range(3 * width)):
        assert pixels[image, row, column] == grid.active[image, row // height, column // width]


def test_sizes_that_the_grid_does_not_divide_are_named():
    grid = PatchGrid.random(1, (2, 3), keep=2)
    assert grid.patch_size((4, 9)) == (2, 3)
    for size in ((5, 9), (4, 8)):
        with pytest.raises(ValueError, match=f"2x3 patches .* {size[0]}x{size[1]} pixels; .* multiples of 2 and 3"):
            grid.pixels(size)


def test_permute_reorders_rows_only():
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(grid.num_active, generator=torch.Generator().manual_seed(1))
    permuted = grid.permute(order)
    assert torch.equal(permuted.active, grid.active)
    assert torch.equal(permuted.coords, grid.coords[order])


@pytest.mark.parametrize("keep", [-0.1, 1.1, 10, -1, True, "half"])
def test_an_impossible_keep_is_named(keep):
    with pytest.raises(ValueError, match="keep"):
        PatchGrid.random(1, (3, 3), keep)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        PatchGrid.from_active(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="float32"):
        PatchGrid.from_active(torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match="scores"):
        PatchGrid.from_scores(torch.ones(1, 0, 3), 0.5)
