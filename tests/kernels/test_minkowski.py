"""MinkowskiEngine behind the meaning of this package: against dense-and-mask, its maps, and life without it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsparse import (
    PatchGrid,
    available_backends,
    bind,
    explain,
    pack,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
    sparsify,
    unpack,
    why_unavailable,
)
from patchsparse.backends import OVERRIDE
from patchsparse.backends.minkowski import loading as minkowski_loading

from .cases import cases, packed_of, upsampled
from .dense_masked import DenseMasked
from .test_conv import gradients, masked_conv, operands
from .test_pool import POOLS, masked

problem = minkowski_loading.library().problem
installed = pytest.mark.skipif(problem is not None, reason=str(problem))
same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

# (kernel, stride, padding, depthwise) of the layers of ResNets and ConvNeXts, and of others whose taps are not centred
LAYERS = (
    *((3, 1, 1, False), (3, 2, 1, False), (7, 2, 3, False), (1, 1, 0, False), (1, 2, 0, False), (2, 2, 0, False)),
    *((5, 1, 2, False), (4, 2, 1, False), (3, 1, 1, True), (7, 1, 3, True), (7, 2, 3, True), (5, 2, 2, True)),
)


@installed
@pytest.mark.parametrize(("kernel", "stride", "padding", "depthwise"), LAYERS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_layers_of_networks_equal_dense_and_mask(kernel, stride, padding, depthwise, size):
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(3, 3, 4, generator=generator) < 0.5
    grid = PatchGrid.from_active(active)
    groups = 6 if depthwise else 1
    image = torch.randn(3, 6, 3 * size, 4 * size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6 if depthwise else 9, 6 // groups, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(weight.shape[0], generator=generator, dtype=torch.float64).requires_grad_()
    stencil = {"stride": stride, "padding": padding, "groups": groups}
    expected = masked_conv(image, active, weight.requires_grad_(), bias, **stencil)
    actual = patch_conv2d(pack(image, grid), weight, bias, grid, backend="minkowski", **stencil)
    same(actual, expected)
    inputs = (image, weight, bias)
    for got, wanted in zip(gradients(actual, inputs, 1), gradients(expected, inputs, 1), strict=True):
        same(got, wanted)


@installed
@given(case=cases(), out=st.sampled_from([1, 3, 8]), depthwise=st.booleans())
@settings(max_examples=150)
def test_any_window_equals_dense_and_mask(case, out, depthwise):
    groups = case.image.shape[1] if depthwise else 1
    out = groups if depthwise else out
    image, weight, bias = operands(case, out, groups)
    expected = masked_conv(image, case.grid.active, weight, bias, groups=groups, **case.stencil)
    options = case.stencil | {"groups": groups, "backend": "minkowski"}
    actual = patch_conv2d(pack(image, case.grid), weight, bias, case.grid, **options)
    same(actual, expected)
    inputs = (image, weight, bias)
    wanted = gradients(expected, inputs, case.seed)
    for got, exact in zip(gradients(actual, inputs, case.seed), wanted, strict=True):
        same(got, exact)
    for leaf, exact in zip(inputs, wanted, strict=True):  # one gradient alone takes another way than all together
        same(gradients(actual, (leaf,), case.seed)[0], exact)


@installed
@pytest.mark.parametrize("shape", [(4, 2, 1, 0), (2, 2, 0, 0), (3, 1, 1, 0), (3, 2, 1, 1), (1, 2, 0, 1), (8, 4, 2, 0)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_transposed_conv_equals_dense_and_mask(size, shape):
    kernel, stride, padding, extra = shape
    generator = torch.Generator().manual_seed(size)
    active = torch.rand(2, 3, 2, generator=generator) < 0.6
    grid = PatchGrid.from_active(active)
    image = torch.randn(2, 4, 3 * size, 2 * size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    seen = torch.where(upsampled(active, *image.shape[2:]), image, 0)
    expected = packed_of(F.conv_transpose2d(seen, weight, None, stride, padding, extra), active)
    options = (stride, padding, extra)
    actual = patch_conv_transpose2d(pack(image, grid), weight, None, grid, *options, backend="minkowski")
    same(actual, expected)
    for got, wanted in zip(gradients(actual, (image, weight), 2), gradients(expected, (image, weight), 2), strict=True):
        same(got, wanted)


@installed
@pytest.mark.parametrize("rectified", [False, True])
@given(case=cases(**POOLS))
def test_max_pool_equals_pooling_the_zero_filled_image(rectified, case):
    image, zero_filled = masked(case)
    zero_filled = zero_filled.relu() if rectified else zero_filled
    stencil = (case.kernel, *(case.stencil[name] for name in ("stride", "padding", "dilation")))
    expected = packed_of(F.max_pool2d(zero_filled, *stencil), case.grid.active)
    packed = packed_of(zero_filled, case.grid.active)
    actual = patch_max_pool2d(packed, case.grid, *stencil, backend="minkowski")
    assert torch.equal(actual, expected)
    torch.testing.assert_close(gradients(actual, (image,), 0), gradients(expected, (image,), 0))


@installed
def test_float32_is_as_exact_as_pytorch():
    grid = PatchGrid.random(4, (5, 5), keep=0.4, generator=torch.Generator().manual_seed(0))
    image = torch.randn(4, 32, 20, 20, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(48, 32, 3, 3, generator=torch.Generator().manual_seed(2)) / 17

    def run(dtype, convolve):
        leaves = (image.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
        y = convolve(*leaves)
        return [t.double() for t in (y, *gradients(y, leaves, 3))]

    def dense(x, w):
        return masked_conv(x, grid.active, w, None, padding=1)

    exact, plain = run(torch.float64, dense), run(torch.float32, dense)
    ours = run(torch.float32, lambda x, w: patch_conv2d(pack(x, grid), w, None, grid, 1, 1, backend="minkowski"))
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()


@installed
@pytest.mark.parametrize("groups", [1, 4])
def test_second_derivatives(groups):
    grid = PatchGrid.from_active(torch.tensor([[[True, False], [True, True]]]))
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4 // groups, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    options = {"padding": 1, "groups": groups, "backend": "minkowski"}
    function = lambda x, w: patch_conv2d(x, w, None, grid, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, (packed, weight))
    assert torch.autograd.gradgradcheck(function, (packed, weight))


@installed
# opcheck itself reads .grad of the clones that it makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operator_of_both_gradients_passes_opcheck_and_compiles():
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    grad, x, weight = (torch.randn(*s, requires_grad=True) for s in ((8, 6, 4, 4), (8, 4, 4, 4), (6, 4, 3, 3)))
    options = ([1, 1], [1, 1], [1, 1], 1, "minkowski")
    torch.library.opcheck(
        torch.ops.patchsparse.conv2d_gradients.default, (grad, x, weight, grid.slot, grid.coords, *options)
    )

    def run(x, weight):
        return patch_conv2d(x, weight, None, grid, padding=1, backend="minkowski").square().sum()

    expected = torch.autograd.grad(run(x, weight), (x, weight))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight), (x, weight)), expected)


@installed
def test_an_empty_batch_of_patches_works():
    grid = PatchGrid.random(2, (3, 3), keep=0)
    packed, weight = torch.zeros(0, 4, 2, 2, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    out = patch_conv2d(packed, weight, None, grid, padding=1, backend="minkowski")
    assert out.shape == (0, 6, 2, 2)
    out.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@installed
def test_a_whole_encoder_makes_each_map_once_for_a_mask(monkeypatch):
    """ResNet-18 in float64: features and gradients are those of dense-and-mask, and the second pass makes no map."""
    built: list[str] = []
    manager = minkowski_loading.module().CoordinateManager

    class Counting(manager):
        def __init__(self, **options):
            super().__init__(**options)
            managers.append(self)

        def insert_and_map(self, coordinates, *rest):
            built.append("coordinates")
            return super().insert_and_map(coordinates, *rest)

    managers: list[Counting] = []
    monkeypatch.setattr(minkowski_loading.module(), "CoordinateManager", Counting)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", in_chans=2, features_only=True).double().train()
    reference = DenseMasked(model)
    encoder = sparsify(model, backend="minkowski")
    grid = PatchGrid.random(2, (2, 3), keep=3, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 2, 64, 96, dtype=torch.float64)

    def kernel_maps() -> list[str]:
        return [line for line in repr(managers[0]).splitlines() if "->" in line]

    def step() -> list[torch.Tensor]:
        with bind(encoder, grid):
            features = encoder(pack(image, grid))
        torch.stack([f.square().sum() for f in features]).sum().backward()
        assert len(managers) == 1
        # patches of 32, 16, 8, 4, 2 and 1 pixels; a stem, four 3x3 stages, and a stride between each two
        assert built == ["coordinates"] * 6
        assert len(kernel_maps()) == 1 + 4 + 3
        return features

    step()
    features = step()
    expected = reference(image, grid.active)
    for ours, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(unpack(ours, grid), wanted, rtol=1e-9, atol=1e-9)
    for _ in range(2):
        torch.stack([f.square().sum() for f in reference(image, grid.active)]).sum().backward()
    theirs = dict(reference.model.named_parameters())
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-8)


@installed
def test_rows_that_the_library_reorders_are_read_by_their_coordinates(monkeypatch):
    """On a GPU the hash table decides on the order of the rows: here a manager that turns them round does."""
    manager = minkowski_loading.module().CoordinateManager

    class Turning(manager):
        def insert_and_map(self, coordinates, *rest):
            return super().insert_and_map(coordinates.flip(0).contiguous(), *rest)

    monkeypatch.setattr(minkowski_loading.module(), "CoordinateManager", Turning)
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(2, 3, 2, generator=generator) < 0.6
    image = torch.randn(2, 4, 12, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    for groups, stride in ((1, 1), (1, 2), (4, 1), (4, 2)):
        grid = PatchGrid.from_active(active)
        weight = torch.randn(4, 4 // groups, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        stencil = {"stride": stride, "padding": 1, "groups": groups}
        expected = masked_conv(image, active, weight, None, **stencil)
        actual = patch_conv2d(pack(image, grid), weight, None, grid, backend="minkowski", **stencil)
        same(actual, expected)
        for leaves in ((image, weight), (image,), (weight,)):
            wanted = gradients(expected, leaves, 1)
            same(gradients(actual, leaves, 1), wanted)


@installed
def test_what_it_cannot_do_is_said():
    grid = PatchGrid.random(2, (3, 3), keep=4)
    packed, weight = torch.randn(8, 4, 4, 4), torch.randn(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match=r"cannot run conv2d: MinkowskiEngine computes in float32 and float64, not"):
        patch_conv2d(packed.bfloat16(), torch.randn(4, 4, 3, 3).bfloat16(), None, grid, 1, 1, backend="minkowski")
    with pytest.raises(RuntimeError, match="groups=1 or depthwise, not groups=2"):
        patch_conv2d(packed, weight, None, grid, padding=1, groups=2, backend="minkowski")
    text = explain(patch_conv2d, packed, torch.randn(4, 4, 3, 3), None, grid, padding=1)
    assert "minkowski: can run; slower here by measurement" in text
    assert "minkowski: taken" in explain(
        patch_conv2d, packed, torch.randn(4, 4, 3, 3), None, grid, padding=1, backend="minkowski"
    )
    assert "minkowski" in available_backends()


@pytest.fixture
def absent(monkeypatch):
    """Make Python find no MinkowskiEngine."""
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    minkowski_loading.library.cache_clear()
    yield
    minkowski_loading.library.cache_clear()


def test_without_it_one_sentence_says_how_to_get_it(absent, monkeypatch):
    grid = PatchGrid.random(2, (3, 3), keep=4)
    packed, weight = torch.randn(8, 4, 4, 4), torch.randn(4, 4, 3, 3)
    sentence = r"MinkowskiEngine is not installed; `python scripts/install_minkowski.py`.* builds and installs it"
    with pytest.raises(RuntimeError, match=sentence):
        patch_conv2d(packed, weight, None, grid, padding=1, backend="minkowski")
    assert "minkowski: cannot run, MinkowskiEngine is not installed" in explain(
        patch_conv2d, packed, weight, None, grid, padding=1
    )
    assert "minkowski" not in available_backends()
    assert "\n" not in str(why_unavailable("minkowski"))
    assert patch_conv2d(packed, weight, None, grid, padding=1).shape == packed.shape
    monkeypatch.setenv(OVERRIDE, "minkowski")
    with pytest.raises(RuntimeError, match=sentence):
        patch_conv2d(packed, weight, None, grid, padding=1)


def test_the_script_that_the_sentence_names_says_what_it_lacks(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "install_minkowski.py"
    assert "scripts/install_minkowski.py" in minkowski_loading.HOW
    command = [sys.executable, str(script), "--device", "cpu", "--cache", str(tmp_path)]
    environment = os.environ | {"CXX": "no-such-compiler"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "MinkowskiEngine was not installed: there is no C++ compiler" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_build_for_another_torch_is_named(monkeypatch):
    def broken():
        raise ImportError("undefined symbol: _ZN5torch\nand more")

    monkeypatch.setattr(minkowski_loading, "find_spec", lambda _: True)
    monkeypatch.setattr(minkowski_loading, "_import", broken)
    minkowski_loading.library.cache_clear()
    try:
        reason = str(minkowski_loading.library().problem)
    finally:
        minkowski_loading.library.cache_clear()
    assert reason.startswith("MinkowskiEngine cannot be imported (ImportError: undefined symbol: _ZN5torch); `python")
