"""pack and unpack: layout, inverse, gradients, fill, errors."""

import pytest
import torch
from hypothesis import given

from patchsparse import PatchGrid, pack, unpack

from .cases import cases, packed_of, upsampled


@given(cases())
def test_pack_cuts_the_active_patches_and_unpack_lays_them_back(case):
    packed = pack(case.image, case.grid)
    assert torch.equal(packed, packed_of(case.image, case.grid.active))
    assert packed.numel() == 0 or packed.is_contiguous(memory_format=torch.channels_last)
    seen = upsampled(case.grid.active, *case.image.shape[2:])
    assert torch.equal(unpack(packed, case.grid), torch.where(seen, case.image, 0))


@given(cases(channels=(1, 3)))
def test_unpack_fills_with_a_token_and_returns_its_gradient(case):
    packed = pack(case.image, case.grid).requires_grad_()
    token = case.normal(case.image.shape[1]).requires_grad_()
    seen = upsampled(case.grid.active, *case.image.shape[2:])
    image = unpack(packed, case.grid, fill=token)
    expected = torch.where(seen, case.image, token[:, None, None])
    assert torch.equal(image, expected)
    weight = case.normal(*image.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), token, allow_unused=True)
    actual_packed, actual = torch.autograd.grad((image * weight).sum(), (packed, token))
    torch.testing.assert_close(actual, wanted[0])
    assert torch.equal(actual_packed, packed_of(weight, case.grid.active))


def test_gradcheck_of_pack_and_unpack():
    grid = PatchGrid.random(2, (2, 3), keep=3, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    token = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, grid), image)
    assert torch.autograd.gradcheck(
        lambda x, t: unpack(x, grid, t), (pack(image.detach(), grid).requires_grad_(), token)
    )


def test_nan_of_an_inactive_pixel_never_reaches_an_active_one():
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    seen = upsampled(grid.active, 6, 6)
    image = torch.where(seen, torch.randn(2, 3, 6, 6), torch.nan).requires_grad_()
    packed = pack(image, grid)
    assert packed.isfinite().all()
    packed.sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, seen.expand(2, 3, 6, 6).float())


def test_a_number_fills_and_dtypes_pass():
    grid = PatchGrid.random(1, (2, 2), keep=1, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.int64):
        image = torch.ones(1, 2, 4, 4).to(dtype)
        laid = unpack(pack(image, grid), grid, fill=7.0)
        assert laid.dtype == dtype
        assert int((laid == 7).sum()) == 2 * 12


def test_wrong_shapes_are_named():
    grid = PatchGrid.random(2, (3, 3), keep=4)
    with pytest.raises(ValueError, match=r"3x3 patches does not divide an image of 32x30"):
        pack(torch.zeros(2, 1, 32, 30), grid)
    with pytest.raises(ValueError, match="B=2"):
        pack(torch.zeros(3, 1, 30, 30), grid)
    with pytest.raises(ValueError, match="N=8"):
        unpack(torch.zeros(7, 1, 2, 2), grid)
    with pytest.raises(ValueError, match="one value per channel"):
        unpack(torch.zeros(8, 3, 2, 2), grid, fill=torch.zeros(2))
    with pytest.raises(ValueError, match="meta"):
        pack(torch.zeros(2, 1, 30, 30, device="meta"), grid)
