"""Convolution of every engine against dense-and-mask in plain PyTorch: values, gradients, accuracy, invariances."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchsparse import PatchGrid, available_backends, pack, patch_conv2d, patch_conv_transpose2d, unpack
from patchsparse.backends import gather

from .cases import Case, cases, packed_of, upsampled
from .dense_masked import right_conv2d

ENGINES = [name for name in available_backends() if name not in ("triton", "minkowski")]
METHODS = ("halo", "rows")


def masked_conv(image: Tensor, active: Tensor, weight: Tensor, bias: Tensor | None, **stencil) -> Tensor:
    """Convolve the zero-filled image; return the active patches."""
    seen = upsampled(active, *image.shape[2:])
    dense = right_conv2d(torch.where(seen, image, 0), weight, bias, **stencil)
    return packed_of(dense, active)


def gradients(output: Tensor, inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(output, inputs, direction.to(output), retain_graph=True)


def operands(case: Case, out_channels: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    image = case.image.clone().requires_grad_()
    weight = case.normal(out_channels, image.shape[1] // groups, *case.kernel).requires_grad_()
    return image, weight, case.normal(out_channels).requires_grad_()


@pytest.mark.parametrize("backend", ENGINES)
@given(case=cases(), out=st.sampled_from([1, 3, 8, 16]), groups=st.sampled_from(["one", "two", "depthwise"]))
@settings(max_examples=80)
def test_conv_equals_dense_and_mask(backend, case, out, groups):
    channels = case.image.shape[1]
    two = 2 if channels % 2 == 0 and backend != "cpp" else 1  # the C++ engine takes 1 and plain depthwise
    groups = {"one": 1, "two": two, "depthwise": channels}[groups]
    out = 1 if backend == "cpp" and groups > 1 else out
    image, weight, bias = operands(case, out * groups, groups)
    expected = masked_conv(image, case.grid.active, weight, bias, groups=groups, **case.stencil)
    actual = patch_conv2d(
        pack(image, case.grid), weight, bias, case.grid, groups=groups, backend=backend, **case.stencil
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    inputs = (image, weight, bias)
    for a, e in zip(gradients(actual, inputs, case.seed), gradients(expected, inputs, case.seed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@given(case=cases(channels=(1, 3, 8)), out=st.sampled_from([1, 8]))
def test_both_gather_methods_equal_dense_and_mask(method, case, out):
    image, weight, bias = operands(case, out, 1)
    expected = masked_conv(image, case.grid.active, weight, bias, **case.stencil)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "method", lambda *_: method)
        actual = patch_conv2d(pack(image, case.grid), weight, bias, case.grid, backend="gather", **case.stencil)
        got = gradients(actual, (image, weight, bias), case.seed)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for a, e in zip(got, gradients(expected, (image, weight, bias), case.seed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ENGINES)
@given(
    size=st.sampled_from([1, 2, 4]),
    shape=st.sampled_from([(4, 2, 1, 0), (2, 2, 0, 0), (3, 1, 1, 0), (3, 2, 1, 1), (5, 1, 2, 0), (8, 4, 2, 0)]),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 999),
)
def test_transposed_conv_equals_dense_and_mask(backend, size, shape, groups, seed):
    assume(backend != "cpp" or groups == 1)
    kernel, stride, padding, extra = shape
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(2, 3, 2, generator=generator) < 0.6
    grid = PatchGrid.from_active(active)
    image = torch.randn(2, 4, 3 * size, 2 * size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6 // groups, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    seen = upsampled(active, *image.shape[2:])
    dense = F.conv_transpose2d(torch.where(seen, image, 0), weight, bias, stride, padding, extra, groups)
    expected = packed_of(dense, active)
    actual = patch_conv_transpose2d(
        pack(image, grid), weight, bias, grid, stride, padding, extra, groups, backend=backend
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    inputs = (image, weight, bias)
    for a, e in zip(gradients(actual, inputs, seed), gradients(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_and_gradgradcheck(method, monkeypatch):
    monkeypatch.setattr(gather, "method", lambda *_: method)
    grid = PatchGrid.from_active(torch.tensor([[[True, False], [True, True]]]))
    packed = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def conv(x, w, b):
        return patch_conv2d(x, w, b, grid, padding=1, backend="gather")

    assert torch.autograd.gradcheck(conv, (packed, weight, bias))
    assert torch.autograd.gradgradcheck(conv, (packed, weight, bias), fast_mode=True)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach().double(), exact.detach()
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "size"), [(16, 8), (64, 4), (64, 2), (96, 1)])
def test_accuracy_is_that_of_pytorch(backend, dtype, channels, size):
    """error(ours vs float64) <= 2 x error(PyTorch, same dtype and memory layout, vs float64) + tiny.

    The layout matters: oneDNN's float32 error on channels_last images is twice that on contiguous ones. ``tiny`` is two
    roundings of the float32 accumulator for every dtype: engines may add the same products in another order.
    """
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("the C++ engine has no float16")
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(2, 5, 5, generator=generator) < 0.4
    grid = PatchGrid.from_active(active)
    image = torch.randn(2, channels, 5 * size, 5 * size, generator=generator).to(dtype)
    weight = (torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype)

    def run(compute_dtype, conv):
        leaves = [t.to(compute_dtype).requires_grad_() for t in (image, weight, bias)]
        output = conv(*leaves)
        return output, *gradients(output, tuple(leaves), 1)

    def pytorch(x, w, b):
        w = w.contiguous(memory_format=torch.channels_last)
        return masked_conv(x.contiguous(memory_format=torch.channels_last), active, w, b, padding=1)

    def ours(x, w, b):
        return patch_conv2d(pack(x, grid), w, b, grid, padding=1, backend=backend)

    exact = run(torch.float64, pytorch)
    tiny = 2 * torch.finfo(torch.float32).eps
    for name, e, p, o in zip(("y", "x", "w", "b"), exact, run(dtype, pytorch), run(dtype, ours), strict=True):
        assert relative_error(o, e) <= 2 * relative_error(p, e) + tiny, name


@pytest.mark.parametrize("backend", ENGINES)
def test_everything_active_is_plain_conv(backend):
    grid = PatchGrid.random(2, (3, 4), keep=1.0)
    image, weight = torch.randn(2, 5, 12, 16), torch.randn(7, 5, 3, 3)
    actual = unpack(patch_conv2d(pack(image, grid), weight, None, grid, padding=1, backend=backend), grid)
    torch.testing.assert_close(actual, F.conv2d(image, weight, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("size", [1, 4])
def test_permuting_packed_rows_permutes_the_result(backend, size):
    grid = PatchGrid.random(3, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    packed, weight = torch.randn(12, 64, size, size), torch.randn(64, 64, 3, 3)
    order = torch.randperm(12)
    result = patch_conv2d(packed, weight, None, grid, padding=1, backend=backend)
    shuffled = patch_conv2d(packed[order], weight, None, grid.permute(order), padding=1, backend=backend)
    torch.testing.assert_close(shuffled, result[order], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
def test_images_never_exchange_halos(backend):
    grid = PatchGrid.random(2, (2, 2), keep=1.0)
    image, weight = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3)
    changed = image.clone()
    changed[1] += 100
    first, second = (
        patch_conv2d(pack(x, grid), weight, None, grid, padding=1, backend=backend) for x in (image, changed)
    )
    assert torch.equal(first[:4], second[:4])
    assert not torch.equal(first[4:], second[4:])


@pytest.mark.parametrize("backend", ENGINES)
def test_an_empty_batch_of_patches_works(backend):
    grid = PatchGrid.random(2, (3, 3), keep=0)
    packed = torch.zeros(0, 4, 2, 2, requires_grad=True)
    weight, bias = torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    out = patch_conv2d(packed, weight, bias, grid, padding=1, backend=backend)
    assert out.shape == (0, 6, 2, 2)
    out.sum().backward()
    for leaf in (weight, bias):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", ENGINES)
def test_weight_gradients_are_deterministic(backend):
    grid = PatchGrid.random(4, (9, 9), keep=0.4, generator=torch.Generator().manual_seed(0))
    packed, weight = torch.randn(128, 64, 2, 2), torch.randn(64, 64, 3, 3, requires_grad=True)
    direction = torch.randn(128, 64, 2, 2)

    def weight_gradient():
        out = patch_conv2d(packed, weight, None, grid, padding=1, backend=backend)
        return torch.autograd.grad(out, weight, direction)[0]

    assert torch.equal(weight_gradient(), weight_gradient())


def test_a_slot_map_changed_in_place_is_not_served_from_memory():
    grid = PatchGrid.from_active(torch.tensor([[[True, True, False]]]))
    packed, weight = torch.randn(2, 1, 1, 1), torch.randn(1, 1, 1, 3)
    patch_conv2d(packed, weight, None, grid, padding=(0, 1), backend="gather")
    moved = PatchGrid.from_active(torch.tensor([[[True, False, True]]]))
    grid.slot.copy_(moved.slot)
    grid.coords.copy_(moved.coords)
    actual = patch_conv2d(packed, weight, None, grid, padding=(0, 1), backend="gather")
    torch.testing.assert_close(actual, packed * weight[..., 1])


@pytest.mark.parametrize("backend", ENGINES)
def test_one_channel_with_unequal_strides_in_float32(backend):
    """PyTorch's own convolution is wrong here on channels_last strides; the engines must not inherit that."""
    grid = PatchGrid.random(2, (2, 2), keep=1.0)
    image, weight = torch.randn(2, 1, 8, 8), torch.randn(1, 1, 3, 3)
    expected = F.conv2d(image.double(), weight.double(), None, (1, 2), 1)
    actual = patch_conv2d(pack(image, grid), weight, None, grid, (1, 2), 1, backend=backend)
    torch.testing.assert_close(unpack(actual, grid).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize(
    ("channels", "kernel", "stencil"),
    [
        (4, (5, 2), {"stride": (1, 2), "padding": (6, 0), "dilation": (3, 1)}),
        (2, (2, 2), {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
    ],
)
def test_one_channel_in_each_group_with_unequal_strides_in_bfloat16(backend, channels, kernel, stencil):
    """The same fault of PyTorch's, with groups: tiles as wide as the kernel gave numbers of 1e27."""
    grid = PatchGrid.random(1, (4, 2), keep=6, generator=torch.Generator().manual_seed(0))
    packed, weight = torch.randn(6, channels, 3, 2).bfloat16(), torch.randn(2 * channels, 1, *kernel).bfloat16()
    weight = weight[:channels] if backend == "cpp" else weight  # which takes plain depthwise ones
    options = {"groups": channels, **stencil}
    actual = patch_conv2d(packed, weight, None, grid, backend=backend, **options)
    exact = patch_conv2d(packed.double(), weight.double(), None, grid, backend="gather", **options)
    assert relative_error(actual, exact) < 1e-2
