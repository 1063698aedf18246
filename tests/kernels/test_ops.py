"""The registered operators: opcheck, torch.compile, autocast, checkpointing of plain functions, dispatch, explain."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from patchsparse import (
    PatchGrid,
    available_backends,
    explain,
    pack,
    patch_avg_pool2d,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
    unpack,
)
from patchsparse.backends import OVERRIDE
from patchsparse.ops import conv, layout, pool

from .test_conv import ENGINES


@pytest.fixture
def grid() -> PatchGrid:
    return PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))


def operator_calls(grid, size):
    """Return (operator, arguments) for every registered operator on small random tensors."""

    def leaf(*shape):
        return torch.randn(*shape).requires_grad_()

    maps, options = (grid.slot, grid.coords), ([1, 1], [1, 1], [1, 1], 1, "gather")
    packed, weight = leaf(8, 4, size, size), leaf(6, 4, 3, 3)
    grad = leaf(8, 6, size, size)
    stencil = ([3, 3], [1, 1], [1, 1])
    tap = torch.randint(0, 9, (8, 4, size, size), dtype=torch.uint8)
    return [
        (conv.conv2d, (packed, weight, leaf(6), *maps, *options)),
        (conv.conv2d_dgrad, (grad, weight, *maps, *options)),
        (conv.conv2d_wgrad, (packed, grad, *maps, [3, 3], *options)),
        (conv.conv2d_gradients, (grad, packed, weight, *maps, *options)),
        (pool.max_pool2d, (packed, *maps, *stencil, [1, 1], "gather")),
        (pool.max_pool2d_grad, (packed.detach(), tap, *maps, *stencil, [1, 1], "gather")),
        (pool.avg_pool2d, (packed, *maps, *stencil, 9, True, "gather")),
        (pool.avg_pool2d_grad, (packed, *maps, *stencil, 9, False, "gather")),
        (layout.pack, (leaf(2, 4, 3 * size, 3 * size), *maps)),
        (layout.unpack, (packed, leaf(4), *maps)),
    ]


# opcheck itself reads .grad of the clones that it makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("index", range(10))
def test_opcheck(grid, size, index):
    operator, arguments = operator_calls(grid, size)[index]
    torch.library.opcheck(operator.registered, arguments)


def network(packed, image, weight, grid):
    """Use every function once; returns a scalar."""
    y = patch_conv2d(pack(image, grid) + packed, weight, None, grid, padding=1).relu()
    y = patch_max_pool2d(y, grid, 3, 2, 1)
    y = patch_avg_pool2d(y, grid, 3, 1, 1, count_include_pad=False)
    y = patch_conv_transpose2d(y, weight[:, :, :2, :2], None, grid, stride=2)
    return unpack(y, grid, weight[0, :, 0, 0]).square().mean()


def test_compiles_to_one_graph_and_never_again_for_a_new_grid():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    for seed in range(3):
        grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(seed))
        packed, image = torch.randn(8, 4, 4, 4, requires_grad=True), torch.randn(2, 4, 12, 12)
        expected = torch.autograd.grad(network(packed, image, weight, grid), (packed, weight))
        actual = torch.autograd.grad(compiled(packed, image, weight, grid), (packed, weight))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile's inductor needs a C++ compiler")
def test_inductor_gets_the_strides_that_the_shape_functions_promise(grid):
    def block(x, weight):
        return patch_conv2d(x, weight, None, grid, padding=1).relu() * 2

    packed, weight = torch.randn(8, 4, 2, 2, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    expected = torch.autograd.grad(block(packed, weight).sum(), (packed, weight))
    actual = torch.autograd.grad(torch.compile(block, fullgraph=True)(packed, weight).sum(), (packed, weight))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast_casts_like_conv2d(grid):
    packed = torch.randn(8, 4, 4, 4)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_conv2d(packed, weight, None, grid, padding=1)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_conv2d(packed.double(), weight.double(), None, grid, padding=1).dtype == torch.float64


def test_checkpointing_recomputes_the_same_gradient(grid):
    packed = torch.randn(8, 4, 4, 4, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)

    def block(x):
        return patch_conv2d(x, weight, None, grid, padding=1).relu()

    plain = torch.autograd.grad(block(block(packed)).sum(), (packed, weight))
    for reentrant in (True, False):
        hidden = checkpoint(block, packed, use_reentrant=reentrant)
        out = checkpoint(block, hidden, use_reentrant=reentrant)
        packed.grad = weight.grad = None
        out.sum().backward()
        assert packed.grad is not None
        assert weight.grad is not None
        assert torch.equal(packed.grad, plain[0])
        assert torch.equal(weight.grad, plain[1])


def test_explain_names_the_engine_and_the_reasons(grid, monkeypatch):
    packed, weight = torch.randn(8, 64, 2, 2), torch.randn(64, 64, 3, 3)
    monkeypatch.delenv(OVERRIDE, raising=False)
    text = explain(patch_conv2d, packed, weight, None, grid, padding=1)
    for name in available_backends():
        assert name in text
    assert "taken" in text
    assert "method rows" in explain(patch_conv2d, packed, weight, None, grid, padding=1, backend="gather")
    assert "never leaves its patch" in explain(patch_conv2d, packed, torch.randn(64, 64, 1, 1), None, grid)
    monkeypatch.setenv(OVERRIDE, "dense")
    assert "dense: taken" in explain(patch_conv2d, packed, weight, None, grid, padding=1)


def test_the_environment_variable_overrides_auto_and_nothing_else(grid, monkeypatch):
    packed, weight = torch.randn(8, 4, 2, 2), torch.randn(4, 4, 3, 3)
    monkeypatch.setenv(OVERRIDE, "unheard-of")
    with pytest.raises(ValueError, match="unheard-of"):
        patch_conv2d(packed, weight, None, grid, padding=1)
    patch_conv2d(packed, weight, None, grid, padding=1, backend="gather")


@pytest.mark.parametrize("backend", ENGINES)
def test_named_backends_agree(grid, backend):
    packed, weight = torch.randn(8, 4, 2, 2), torch.randn(4, 4, 3, 3)
    expected = patch_conv2d(packed, weight, None, grid, padding=1, backend="dense")
    actual = patch_conv2d(packed, weight, None, grid, padding=1, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packed": torch.zeros(7, 4, 2, 2)}, ValueError, r"N=8 active patches.*\(7, 4, 2, 2\)"),
        (
            {"packed": torch.zeros(8, 3, 2, 2)},
            ValueError,
            r"takes 4 input channels.*has|takes 4 input channels",
        ),
        ({"weight": torch.zeros(6, 4, 3, 3).double()}, TypeError, "float64"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \(6,\)"),
        ({"padding": 0}, ValueError, "does not map patches to patches"),
        ({"stride": 4, "padding": 0}, ValueError, "stride 4 does not divide the patch height of 2"),
        ({"groups": 3}, ValueError, "groups=3"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' is unknown"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be an int or a pair"),
    ],
)
def test_wrong_arguments_are_named(grid, changes, error, message):
    arguments = {
        "packed": torch.zeros(8, 4, 2, 2),
        "weight": torch.zeros(6, 4, 3, 3),
        "bias": None,
        "grid": grid,
        "padding": 1,
    }
    with pytest.raises(error, match=message):
        patch_conv2d(**{**arguments, **changes})


def test_a_transposed_conv_that_does_not_double_the_image_is_named(grid):
    with pytest.raises(ValueError, match="not 2 times the input"):
        patch_conv_transpose2d(torch.zeros(8, 4, 2, 2), torch.zeros(4, 4, 3, 3), None, grid, stride=2)
