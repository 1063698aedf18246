"""The C++ engine: accuracy on every instruction set, layouts, threads, poisoned buffers, its row lists."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchsparse import PatchGrid, pack, patch_conv2d, patch_conv_transpose2d, patch_max_pool2d, unpack
from patchsparse.backends import cpp, tables
from patchsparse.backends.cpp import library, native, plans
from patchsparse.geometry import Stencil
from patchsparse.ops import conv as ops

from ..matrix import pairwise
from .cases import cases, packed_of, upsampled
from .test_conv import gradients, masked_conv

ISAS = library.load().isas
WAYS = [(isa, torch.bfloat16) for isa in ISAS]
WAYS += [(isa, torch.float32) for isa in ISAS if native.ISAS.index(isa) < native.BF16]  # later ones add bfloat16 alone
pytestmark = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))


def use(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv(library.ISA, isa)


@pytest.mark.parametrize(("isa", "dtype"), WAYS)
@given(
    case=cases(
        kernels=(1, 2, 3, 5, 7),
        dilations=(1, 2, 3),
        channels=(1, 3, 16, 17, 40, 70),
        patches=(1, 2, 4, 8, 16, 32),
        dtype=torch.float32,
    ),
    out=st.sampled_from([1, 5, 16, 33, 64]),
    depthwise=st.booleans(),
)
@settings(max_examples=30)
def test_error_is_at_most_twice_that_of_pytorch(isa, dtype, case, out, depthwise):
    """error(ours vs float64) <= 2 x error(PyTorch, same dtype, vs float64) + tiny.

    ``tiny`` is four roundings of the root of the summed squares of all products: a sum that cancels to nearly nothing
    is as exact as its terms allow, and over a single element PyTorch's error can be nothing by luck.
    """
    if max(case.image.shape[2:]) > 64:  # large patches on a large grid only repeat what smaller ones show
        return
    channels = case.image.shape[1]
    groups = channels if depthwise else 1
    weight = case.normal(channels if depthwise else out, channels // groups, *case.kernel)
    operands = tuple(t.to(dtype) for t in (case.image, weight, case.normal(weight.shape[0])))

    def pytorch(x, w, b):
        return masked_conv(x, case.grid.active, w, b, groups=groups, **case.stencil)

    def ours(x, w, b):
        options = (*(list(case.stencil[name]) for name in ("stride", "padding", "dilation")), groups, "cpp")
        return ops.conv2d(pack(x, case.grid), w, b, case.grid.slot, case.grid.coords, *options)  # also 1x1

    def run(conv, leaves, power=torch.clone):
        leaves = tuple(power(t).detach().requires_grad_() for t in leaves)
        output = conv(*leaves)
        return output.detach(), *torch.autograd.grad(
            output, leaves, power(case.normal(*output.shape).to(dtype)).to(output)
        )

    wide = tuple(t.double() for t in operands)
    exact, theirs, squares = run(pytorch, wide), run(pytorch, operands), run(pytorch, wide, torch.square)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, isa)
        result = run(ours, operands)
    unit = 4 * torch.finfo(dtype).eps
    sides = zip(
        ("y", "x", "w"), exact, theirs, result, squares, strict=False
    )  # the bias's gradient is PyTorch's own sum
    for name, e, p, o, q in sides:
        error, allowed = (o.double() - e).norm(), 2 * (p.double() - e).norm() + unit * q.sqrt().norm()
        assert error <= allowed, name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "channels"), [(8, 64), (4, 70), (2, 256), (1, 130)])
def test_the_tuned_shapes_equal_dense_and_mask(isa, size, channels, monkeypatch):
    use(monkeypatch, isa)
    grid = PatchGrid.random(4, (5, 6), keep=0.4, generator=torch.Generator().manual_seed(size))
    image = torch.randn(4, channels, 5 * size, 6 * size, dtype=torch.float64).requires_grad_()
    weight = (torch.randn(2 * channels, channels, 3, 3, dtype=torch.float64) / (9 * channels) ** 0.5).requires_grad_()
    expected = masked_conv(image, grid.active, weight, None, padding=1)
    actual = patch_conv2d(pack(image.float(), grid), weight.float(), None, grid, padding=1, backend="cpp")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    leaves = (image, weight)
    for a, e in zip(gradients(actual, leaves, 0), gradients(expected, leaves, 0), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "stencil", [Stencil((3, 3), (1, 1), (1, 1)), Stencil((3, 5), (2, 1), (1, 2)), Stencil((2, 1), (2, 1))]
)
def test_gradcheck(depthwise, stencil):
    grid = PatchGrid.from_active(torch.tensor([[[True, False], [True, True]]]))
    packed = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1 if depthwise else 3, *stencil.kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    if stencil.local:  # the front door would hand it to PyTorch
        out = cpp.conv2d(packed, weight, bias, grid.slot, grid.coords, stencil, 3 if depthwise else 1)
        expected = F.conv2d(packed, weight, bias, stencil.stride, 0, 1, 3 if depthwise else 1)
        torch.testing.assert_close(out, expected)
        return

    def conv(x, w, b):
        options = (stencil.stride, stencil.padding, 1, 3 if depthwise else 1)
        return patch_conv2d(x, w, b, grid, *options, backend="cpp")

    assert torch.autograd.gradcheck(conv, (packed, weight, bias))
    assert torch.autograd.gradgradcheck(conv, (packed, weight, bias), fast_mode=True)


def everything(grid: PatchGrid, packed: Tensor, weight: Tensor, deep: Tensor) -> list[Tensor]:
    """Return outputs and gradients of every operation of the engine."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in (packed, weight, deep))
    x, w, d = leaves
    outputs = (
        patch_conv2d(x, w, None, grid, padding=1, backend="cpp"),
        patch_conv2d(x, w, None, grid, 2, 1, backend="cpp") if packed.shape[2] > 1 else x,
        patch_conv2d(x, d, None, grid, padding=3, groups=d.shape[0], backend="cpp"),
        patch_max_pool2d(x, grid, 3, 1, 1, backend="cpp"),
        patch_conv_transpose2d(x, w[:, :, :2, :2], None, grid, 2, backend="cpp"),
    )
    total = sum((o.square().sum() for o in outputs), start=x.new_zeros(()))
    return [o.detach() for o in outputs] + list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize(
    ("isa", "dtype", "shape"),
    pairwise(
        ISAS,
        [torch.float32, torch.bfloat16],
        [(1, 96), (2, 70), (4, 33)],
        allowed=lambda isa, dtype, _: (isa, dtype) in WAYS,
    ),
)
def test_results_depend_neither_on_threads_nor_on_the_run(isa, dtype, shape, monkeypatch):
    size, channels = shape
    use(monkeypatch, isa)
    grid = PatchGrid.random(12, (7, 6), keep=0.6, generator=torch.Generator().manual_seed(1))
    packed = torch.randn(grid.num_active, channels, size, size).to(dtype)
    weight, deep = torch.randn(channels, channels, 3, 3).to(dtype), torch.randn(channels, 1, 7, 7).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(everything(grid, packed, weight, deep))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4])
def test_poisoned_buffers_do_not_matter(size, dtype, monkeypatch):
    """Every element of a result is written: memory that the engine gets uninitialised is filled with NaN first."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    grid = PatchGrid.random(2, (3, 4), keep=5, generator=torch.Generator().manual_seed(0))
    packed = torch.randn(10, 17, size, size).to(dtype)
    weight, deep = torch.randn(17, 17, 3, 3).to(dtype), torch.randn(17, 1, 7, 7).to(dtype)
    clean = everything(grid, packed, weight, deep)
    torch.use_deterministic_algorithms(True)  # new_empty now returns NaN
    try:
        assert packed.new_empty(3).isnan().all()
        poisoned = everything(grid, packed, weight, deep)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


def test_a_nan_in_an_inactive_pixel_reaches_nobody():
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 8, 12, 12)
    image[~upsampled(grid.active, 12, 12).expand_as(image)] = torch.nan
    out = patch_conv2d(pack(image, grid), torch.randn(8, 8, 5, 5), None, grid, padding=2, backend="cpp")
    assert out.isfinite().all()


def test_a_nan_wins_the_maximum_as_in_pytorch():
    grid = PatchGrid.random(1, (2, 2), keep=1.0)
    image = torch.randn(1, 3, 8, 8)
    image[0, 1, 3, 4] = torch.nan
    expected = packed_of(F.max_pool2d(image, 3, 1, 1), grid.active)
    actual = patch_max_pool2d(pack(image, grid), grid, 3, 1, 1, backend="cpp")
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize(("isa", "dtype"), WAYS)
@pytest.mark.parametrize("size", [1, 2])
def test_any_layout_of_the_weights_gives_the_same(isa, dtype, size, monkeypatch):
    use(monkeypatch, isa)
    grid = PatchGrid.random(2, (4, 4), keep=7, generator=torch.Generator().manual_seed(3))
    packed, weight = torch.randn(14, 40, size, size).to(dtype), torch.randn(50, 40, 3, 3).to(dtype)
    layouts = (
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        torch.cat((weight, weight), 1)[:, 40:],
    )
    results = []
    for layout in layouts:
        x, w = packed.clone().requires_grad_(), layout.detach().requires_grad_()
        out = patch_conv2d(x, w, None, grid, padding=1, backend="cpp")
        strided = patch_conv2d(x, w, None, grid, stride=size, padding=1, backend="cpp")
        results.append((out, strided, *gradients(out, (x, w), 0), *gradients(strided, (x, w), 1)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_packed_tensors_of_any_layout_are_read_right():
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    packed, weight = torch.randn(8, 6, 4, 4), torch.randn(5, 6, 3, 3)
    expected = patch_conv2d(packed, weight, None, grid, padding=1, backend="cpp")
    for other in (packed.contiguous(memory_format=torch.channels_last), torch.cat((packed, packed), 1)[:, 6:]):
        assert torch.equal(patch_conv2d(other, weight, None, grid, padding=1, backend="cpp"), expected)


@pytest.mark.parametrize("size", [1, 4])
def test_permuting_packed_rows_permutes_the_result_of_every_operation(size):
    grid = PatchGrid.random(3, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    packed, weight, deep = torch.randn(12, 20, size, size), torch.randn(20, 20, 3, 3), torch.randn(20, 1, 7, 7)
    order = torch.randperm(12)
    plain = everything(grid, packed, weight, deep)
    shuffled = everything(grid.permute(order), packed[order], weight, deep)
    for a, b in zip(plain[:-2], shuffled[:-2], strict=True):
        torch.testing.assert_close(b, a[order], rtol=1e-4, atol=1e-3)
    for a, b in zip(plain[-2:], shuffled[-2:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-1)


@given(case=cases(), adjoint=st.booleans())
def test_the_row_lists_hold_each_active_pair_once(case, adjoint):
    """Inactive neighbours cost nothing: the pairs that are multiplied are those of the row table, no more."""
    stencil = Stencil(case.kernel, **case.stencil)
    size = (case.image.shape[2] // case.grid.shape[0], case.image.shape[3] // case.grid.shape[1])
    if case.grid.num_active == 0:
        return
    source = stencil.output_size(size) if adjoint else size
    plan = plans.plan_for(case.grid.slot, case.grid.coords, source, stencil, adjoint, native.GROUPS)
    numbers = plan.statistics()
    active = (tables.tap_rows(case.grid.slot, case.grid.coords, size, stencil) >= 0).sum()
    assert numbers["pairs"] == int(active)
    assert numbers["sources" if adjoint else "targets"] == case.grid.num_active * source[0] * source[1] // (
        1 if adjoint else stencil.stride[0] * stencil.stride[1]
    )


def test_a_stack_like_spark_trains_as_the_dense_engine_does():
    """Stem, pooling, residual blocks with batch norm, a stride, depthwise: loss and gradients after five steps."""
    grid = PatchGrid.random(4, (4, 4), keep=7, generator=torch.Generator().manual_seed(0))
    image = torch.randn(4, 12, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def train(backend: str, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        shapes = [(24, 12, 7, 7), (24, 24, 3, 3), (40, 24, 3, 3), (40, 1, 7, 7), (40, 40, 3, 3)]
        weights = [
            (torch.randn(s, generator=generator, dtype=torch.float64) / (s[1] * s[2] * s[3]) ** 0.5)
            .to(dtype)
            .requires_grad_()
            for s in shapes
        ]
        optimizer = torch.optim.SGD(weights, lr=0.05)
        losses = []
        for _ in range(5):
            stem, block, strided, deep, last = weights
            x = patch_conv2d(pack(image.to(dtype), grid), stem, None, grid, 2, 3, backend=backend)
            x = patch_max_pool2d(F.batch_norm(x, None, None, training=True).relu(), grid, 3, 2, 1, backend=backend)
            x = x + F.batch_norm(patch_conv2d(x, block, None, grid, 1, 1, backend=backend), None, None, training=True)
            x = patch_conv2d(x.relu(), strided, None, grid, 2, 1, backend=backend)
            x = patch_conv2d(x, deep, None, grid, 1, 3, groups=40, backend=backend)
            x = patch_conv2d(F.gelu(x), last, None, grid, 1, 1, backend=backend)
            loss = (unpack(x, grid) - 0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        return torch.stack(losses)

    exact = train("dense", torch.float64)
    torch.testing.assert_close(train("cpp", torch.float64), exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(train("cpp", torch.float32), exact, rtol=1e-4, atol=0)
