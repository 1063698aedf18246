"""Depthwise convolution by the C++ engine: every kind of patch size, kernel and instruction set, threads."""

import pytest
import torch
from torch import Tensor

from patchsparse import PatchGrid, pack, patch_conv2d
from patchsparse.backends import cpp
from patchsparse.backends.cpp import library
from patchsparse.geometry import Stencil

from .test_conv import gradients, masked_conv

ISAS = library.load().isas
pytestmark = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))
SIZES = [
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 4),
    (6, 2),
    (2, 3),
    (1, 4),
    (8, 8),
    (2, 8),
    (16, 10),
]  # squares, pixels, whole rows
KERNELS = [(3, 3), (5, 5), (7, 7), (1, 7), (11, 1), (3, 5), (9, 9)]


def operands(channels: int, size: tuple[int, int], kernel: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return an image of 5x6 patches, a weight and a bias, all float64 leaves of values that ``dtype`` holds."""
    generator = torch.Generator().manual_seed(channels + 7 * size[0] + size[1])

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).double().requires_grad_()

    image = normal(3, channels, 5 * size[0], 6 * size[1])
    return image, normal(channels, 1, *kernel, scale=(kernel[0] * kernel[1]) ** -0.5), normal(channels)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "channels"), [(k, c) for k, c in zip(KERNELS, (1, 17, 40, 64, 70, 16, 5), strict=True)]
)
def test_outputs_and_gradients_equal_dense_and_mask(isa, size, kernel, channels, monkeypatch):
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(3, (5, 6), keep=0.6, generator=torch.Generator().manual_seed(0))
    leaves = image, weight, bias = operands(channels, size, kernel, torch.float32)
    padding = (kernel[0] // 2, kernel[1] // 2)
    expected = masked_conv(image, grid.active, weight, bias, padding=padding, groups=channels)
    operand = pack(image.float(), grid)
    actual = patch_conv2d(operand, weight.float(), bias.float(), grid, 1, padding, 1, channels, backend="cpp")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for a, e in zip(gradients(actual, leaves, 0), gradients(expected, leaves, 0), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bfloat16_is_summed_in_float32_and_rounded_once(isa, size, monkeypatch):
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(3, (5, 6), keep=0.6, generator=torch.Generator().manual_seed(0))
    leaves = image, weight, bias = operands(40, (size, size), (7, 7), torch.bfloat16)
    expected = masked_conv(image, grid.active, weight, bias, padding=3, groups=40)
    x, w, b = (t.to(torch.bfloat16) for t in (pack(image, grid), weight, bias))
    actual = patch_conv2d(x, w, b, grid, 1, 3, 1, 40, backend="cpp")
    one_rounding = 2.0**-8
    torch.testing.assert_close(actual.double(), expected, rtol=one_rounding, atol=1e-4)
    for a, e in zip(gradients(actual, leaves, 0), gradients(expected, leaves, 0), strict=True):
        direction = 2 * one_rounding  # that of the gradient that comes in, besides
        torch.testing.assert_close(a, e, rtol=direction, atol=direction * float(e.abs().max()))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("channels", [16, 200])
def test_the_weight_gradient_does_not_depend_on_threads(size, channels):
    """Threads own channels, and cut them anywhere: also within the slices that a thread takes at once."""
    grid = PatchGrid.random(9, (5, 6), keep=0.6, generator=torch.Generator().manual_seed(0))
    x, grad = (torch.randn(grid.num_active, channels, size, size) for _ in range(2))
    stencil = Stencil((7, 7), (1, 1), (3, 3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(cpp.conv2d_wgrad(x, grad, grid.slot, grid.coords, stencil, channels))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_active_neighbour_is_one_product_per_pixel():
    """A single active patch of one pixel reads nothing but itself."""
    grid = PatchGrid.from_active(torch.eye(4, dtype=torch.bool)[None] & (torch.arange(4) == 2))
    x, weight = torch.randn(1, 24, 1, 1), torch.randn(24, 1, 7, 7)
    out = patch_conv2d(x, weight, None, grid, padding=3, groups=24, backend="cpp")
    assert torch.equal(out, x * weight[None, :, 0, 3:4, 3:4])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "side"), [(7, 1, 1, 8), (7, 1, 1, 4), (3, 2, 1, 16), (3, 1, 2, 8)]
)
def test_a_weight_gradient_over_many_patches_is_as_exact_as_pytorch(isa, kernel, stride, dilation, side, monkeypatch):
    """A gradient adds up some twenty thousand products; rounding after each of them would cost two digits."""
    monkeypatch.setenv(library.ISA, isa)
    channels, padding = 16, dilation * (kernel // 2)
    generator = torch.Generator().manual_seed(kernel + side)
    image = torch.randn(4, channels, 9 * side, 9 * side, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator)
    grid = PatchGrid.from_active(torch.ones(4, 9, 9, dtype=torch.bool))
    grad = torch.randn(4, channels, 9 * side // stride, 9 * side // stride, generator=generator)

    def of(x: Tensor, g: Tensor) -> Tensor:
        leaf = weight.to(x).requires_grad_()
        y = torch.nn.functional.conv2d(x, leaf, None, stride, padding, dilation, channels)
        return torch.autograd.grad(y, leaf, g)[0].double()

    leaf = weight.clone().requires_grad_()
    y = patch_conv2d(pack(image, grid), leaf, None, grid, stride, padding, dilation, channels, backend="cpp")
    ours = torch.autograd.grad(y, leaf, pack(grad, grid))[0].double()
    exact, theirs = of(image.double(), grad.double()), of(image, grad)
    tiny = 4 * torch.finfo(torch.float32).eps * float(grad[:, 0].double().square().sum().sqrt())  # as in test_cpp.py
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + tiny
