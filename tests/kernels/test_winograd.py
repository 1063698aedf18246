"""Winograd's method in the C++ engine: equal to the direct sum, as exact as PyTorch, on patches and whole images."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from patchsparse import PatchGrid, explain, image_conv2d, image_conv_transpose2d, image_engine, pack, patch_conv2d
from patchsparse.backends import cpp
from patchsparse.backends.cpp import library, native
from patchsparse.geometry import Stencil

from .test_conv import gradients, masked_conv, relative_error

ISAS = library.load().isas
pytestmark = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))
THREE = Stencil((3, 3), (1, 1), (1, 1))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("last", [False, True])
@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    grid_shape=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    keep=st.floats(0, 1),
    size=st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 10])),
    channels=st.tuples(st.sampled_from([32, 33, 37, 50]), st.sampled_from([32, 35, 70])),
)
def test_float64_equals_dense_and_mask(last, batch, grid_shape, keep, size, channels):
    """Every tail of channels, tiles that fill no block, patches that are not square, no active patch at all."""
    grid = PatchGrid.random(batch, grid_shape, keep, generator=torch.Generator().manual_seed(1))
    assert cpp.winograd(torch.float64, size, channels, THREE)
    image = normal(batch, channels[0], grid_shape[0] * size[0], grid_shape[1] * size[1]).requires_grad_()
    weight = normal(channels[1], channels[0], 3, 3, seed=2) / 10
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    leaves = (image, weight.requires_grad_(), normal(channels[1], seed=3).requires_grad_())
    expected = masked_conv(image, grid.active, *leaves[1:], padding=1)
    actual = patch_conv2d(pack(image, grid), *leaves[1:], grid, padding=1, backend="cpp")
    for a, e in zip((actual, *gradients(actual, leaves, 4)), (expected, *gradients(expected, leaves, 4)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "channels"), [(8, 64), (4, 160), (2, 256)])
def test_float32_is_as_exact_as_pytorch(isa, size, channels, monkeypatch):
    """error(ours) <= 2 x error(PyTorch), both against float64; enough tiles for several blocks, bands and chunks.

    The weight gradient, where PyTorch's sums are short, may err by four roundings more, as in the direct way's test.
    """
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(3, (6, 6), keep=0.6, generator=torch.Generator().manual_seed(size))
    operands = (normal(3, channels, 6 * size, 6 * size), normal(channels, channels, 3, 3, seed=1) / (3 * channels**0.5))

    def run(conv, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = tuple(t.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for t in operands)
        output = conv(*leaves)
        return output, *gradients(output, leaves, 2)

    def pytorch(x: Tensor, w: Tensor) -> Tensor:
        return masked_conv(x, grid.active, w, None, padding=1)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return patch_conv2d(pack(x, grid), w, None, grid, padding=1, backend="cpp")

    exact = run(pytorch, torch.float64)
    allowed = (0.0, 0.0, 4 * torch.finfo(torch.float32).eps)
    for more, e, p, o in zip(allowed, exact, run(pytorch, torch.float32), run(ours, torch.float32), strict=True):
        assert relative_error(o, e) <= 2 * relative_error(p, e) + more


@pytest.mark.parametrize("isa", [isa for isa in ISAS if native.ISAS.index(isa) < native.BF16])
def test_bfloat16_is_rounded_once_on_the_way_out(isa, monkeypatch):
    """Sums are float32: results are those of widened operands, rounded; no element is off by more than a rounding."""
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(2, (4, 5), keep=0.5, generator=torch.Generator().manual_seed(0))
    x, grad = (normal(grid.num_active, c, 4, 6, seed=s).bfloat16() for c, s in ((37, 0), (50, 1)))
    weight, bias, maps = (
        normal(50, 37, 3, 3, seed=2).bfloat16(),
        normal(50, seed=3).bfloat16(),
        (grid.slot, grid.coords),
    )
    assert cpp.winograd(torch.bfloat16, (4, 6), (37, 50), THREE)
    for sides in (
        lambda f: cpp.conv2d(f(x), f(weight), f(bias), *maps, THREE, 1),
        lambda f: cpp.conv2d_dgrad(f(grad), f(weight), *maps, (4, 6), THREE, 1),
        lambda f: cpp.conv2d_wgrad(f(x), f(grad), *maps, THREE, 1),
    ):
        half, full = sides(torch.clone), sides(Tensor.float)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.bfloat16())


def test_results_do_not_depend_on_the_number_of_threads():
    grid = PatchGrid.random(4, (6, 6), keep=0.5, generator=torch.Generator().manual_seed(0))
    x, grad = (normal(grid.num_active, 96, 4, 4, seed=s, dtype=torch.float32) for s in (0, 1))
    weight, maps = normal(96, 96, 3, 3, seed=2, dtype=torch.float32), (grid.slot, grid.coords)
    before = torch.get_num_threads()

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        return (
            cpp.conv2d(x, weight, None, *maps, THREE, 1),
            cpp.conv2d_dgrad(grad, weight, *maps, (4, 4), THREE, 1),
            cpp.conv2d_wgrad(x, grad, *maps, THREE, 1),
        )

    try:
        for a, b, c in zip(run(1), run(2), run(7), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    finally:
        torch.set_num_threads(before)


def test_it_takes_what_it_says_and_nothing_else():
    def takes(dtype=torch.float32, size=(8, 8), channels=(64, 64), stencil=THREE, groups=1) -> bool:
        return cpp.winograd(dtype, size, channels, stencil, groups)

    assert takes()
    assert takes(torch.float64, (2, 10), (32, 100))
    assert takes(dtype=torch.bfloat16) == (library.load().isa_number() < native.BF16)
    assert not takes(dtype=torch.float16)
    assert not takes(size=(1, 1))
    assert not takes(size=(8, 9))
    assert not takes(channels=(64, 31))
    assert not takes(groups=64)
    for stencil in (
        Stencil((3, 3), (2, 2), (1, 1)),
        Stencil((3, 3), (1, 1), (2, 2), (2, 2)),
        Stencil((5, 5), (1, 1), (2, 2)),
    ):
        assert not takes(stencil=stencil)
    grid = PatchGrid.random(1, (3, 3), keep=4)
    arguments = (torch.randn(32, 32, 3, 3), None, grid, 1, 1, 1, 1, "cpp")
    assert "Winograd" in explain(patch_conv2d, torch.randn(4, 32, 4, 4), *arguments)
    assert "Winograd" not in explain(patch_conv2d, torch.randn(4, 32, 1, 1), *arguments)


@pytest.mark.parametrize("shape", [(2, 40, 6, 10), (1, 32, 2, 2), (3, 64, 18, 18)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_whole_image_equals_pytorch(shape, bias):
    leaves = tuple(
        t.requires_grad_() for t in (normal(*shape), normal(48, shape[1], 3, 3, seed=1), normal(48, seed=2))[: 2 + bias]
    )
    image, weight, *rest = leaves
    added = rest[0] if rest else None
    assert image_engine(image, 48)
    actual, expected = image_conv2d(image, weight, added), F.conv2d(image, weight, added, padding=1)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    for a, e in zip((actual, *gradients(actual, leaves, 3)), (expected, *gradients(expected, leaves, 3)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 5, 6, 10), (1, 32, 1, 3), (3, 40, 9, 9)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_whole_image_enlarged_equals_pytorch(shape, bias):
    leaves = tuple(
        t.requires_grad_() for t in (normal(*shape), normal(shape[1], 7, 4, 4, seed=1), normal(7, seed=2))[: 2 + bias]
    )
    image, weight, *rest = leaves
    added = rest[0] if rest else None
    actual, expected = image_conv_transpose2d(image, weight, added), F.conv_transpose2d(image, weight, added, 2, 1)
    assert actual.is_contiguous(memory_format=torch.channels_last)  # the engine's
    for a, e in zip((actual, *gradients(actual, leaves, 3)), (expected, *gradients(expected, leaves, 3)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
    assert torch.equal(image_conv_transpose2d(image, weight, added, "dense"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_1x1_convolution_of_a_whole_image_equals_pytorch(dtype, backend):
    leaves = [normal(3, 40, 9, 7), normal(24, 40, 1, 1, seed=1), normal(24, seed=2)]
    image, weight, bias = leaves = tuple(t.to(dtype).requires_grad_() for t in leaves)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    actual, expected = image_conv2d(image, weight, bias, backend), F.conv2d(image, weight, bias)
    for a, e in zip((actual, *gradients(actual, leaves, 3)), (expected, *gradients(expected, leaves, 3)), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_where_the_engine_does_not_fit_pytorch_convolves_the_image(monkeypatch):
    image, weight = normal(1, 32, 4, 4, dtype=torch.float32), normal(32, 32, 3, 3, dtype=torch.float32)
    assert image_engine(image, 32)
    for odd in (image[:, :, :3], image[:, :31], image.bfloat16()):
        assert not image_engine(odd, 32)
    assert not image_engine(image, 32, "gather")
    with torch.autocast("cpu", torch.bfloat16):
        assert not image_engine(image, 32)
        assert image_conv2d(image, weight).dtype == torch.bfloat16
    assert torch.equal(image_conv2d(image[:, :, :3], weight), F.conv2d(image[:, :, :3], weight, padding=1))
    monkeypatch.setenv("PATCHSPARSE_BACKEND", "gather")
    assert not image_engine(image, 32)


def test_an_image_seen_in_inference_mode_can_be_trained_on_afterwards():
    weight = normal(32, 32, 3, 3, dtype=torch.float32).requires_grad_()
    image = normal(11, 32, 2, 2, dtype=torch.float32)  # a batch that no other test has, so that its grid is new
    with torch.inference_mode():
        image_conv2d(image, weight)
    image_conv2d(image, weight).sum().backward()
    assert weight.grad is not None


def test_counting_memory_without_computing_leaves_the_grids_alone():
    """Under fake tensors nothing is computed, and no fake grid stays behind for real images."""
    with FakeTensorMode():
        image, weight = torch.randn(13, 32, 4, 4), torch.randn(32, 32, 3, 3)
        assert image_conv2d(image, weight).shape == (13, 32, 4, 4)
    real = image_conv2d(normal(13, 32, 4, 4), normal(32, 32, 3, 3))
    torch.testing.assert_close(real, F.conv2d(normal(13, 32, 4, 4), normal(32, 32, 3, 3), padding=1))
