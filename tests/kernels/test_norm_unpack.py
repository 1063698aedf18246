"""Batch normalisation fused with ``unpack``: the PyTorch version, which is the specification, against its two parts."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from patchsparse import PatchGrid, patch_batch_norm_unpack, unpack
from patchsparse.ops import norm_unpack as ops

UNEQUAL = torch.tensor([[[True, False, True], [False, False, True]], [[False] * 3, [False, True, False]]])
CHANNELS = 5


def problem(active: torch.Tensor = UNEQUAL, dtype: torch.dtype = torch.float64) -> tuple[PatchGrid, tuple]:
    """Return a grid and packed, weight, bias and token."""
    g = torch.Generator().manual_seed(0)
    grid = PatchGrid.from_active(active)
    shapes = ((grid.num_active, CHANNELS, 2, 3), (CHANNELS,), (CHANNELS,), (CHANNELS,))
    return grid, tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def statistics(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((CHANNELS,), 0.3, dtype=dtype), torch.full((CHANNELS,), 2.0, dtype=dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("active", [UNEQUAL, torch.ones(2, 2, 3, dtype=torch.bool)], ids=["unequal", "everything"])
def test_equals_batch_norm_then_unpack(active, training):
    grid, (x, weight, bias, token) = problem(active)
    states = [statistics() for _ in "ab"]
    got = patch_batch_norm_unpack(x, grid, weight, bias, *states[0], token, training)
    expected = unpack(F.batch_norm(x, *states[1], weight, bias, training), grid, fill=token)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other)
    direction = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(y, (x, weight, bias, token), direction) for y in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fill", [0.0, -2.5, torch.tensor([7.0])], ids=["zero", "number", "one value"])
def test_fill_may_be_a_number_and_weights_may_be_absent(fill):
    grid, (x, *_) = problem()
    got = patch_batch_norm_unpack(x, grid, None, None, None, None, fill)
    torch.testing.assert_close(got, unpack(F.batch_norm(x, None, None, training=True), grid, fill))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_against_differences(training):
    grid, inputs = problem()

    def run(x, weight, bias, token):
        return patch_batch_norm_unpack(x, grid, weight, bias, *statistics(), token, training)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_with_float32_parameters(dtype):
    """As under autocast: the image is as the features, parameters get float32 gradients, sums are float32."""
    grid, exact = problem()
    rounded = [exact[0].detach().to(dtype).requires_grad_(), *(t.detach().float().requires_grad_() for t in exact[1:])]
    wide = [t.detach().double().requires_grad_() for t in rounded]
    direction = torch.ones(2, CHANNELS, 4, 9, dtype=dtype)
    direction[..., 0] = 3
    results = []
    for x, weight, bias, token in (rounded, wide):
        y = patch_batch_norm_unpack(x, grid, weight, bias, None, None, token)
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight, bias, token), direction.to(y))])
    assert [t.dtype for t in results[0]] == [dtype, dtype, *[torch.float32] * 3]
    eps = torch.finfo(dtype).eps
    for got, expected, tolerance in zip(*results, (eps, eps, 1e-5, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


# opcheck itself reads .grad of the clones that it makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("with_optional", [True, False])
def test_registered_operators_pass_opcheck(with_optional):
    grid, (x, weight, bias, token) = problem(dtype=torch.float32)
    maps = (grid.slot, grid.coords)
    optional = (token, weight, bias) if with_optional else (None, None, None)
    opcheck(ops.batch_norm_unpack.registered, (x, *optional, None, None, *maps, 1e-5, "auto"))
    mean, var = statistics(torch.float32)
    opcheck(ops.batch_norm_unpack.registered, (x, *optional, mean, var, *maps, 1e-5, "auto"))
    grad = torch.ones(2, CHANNELS, 4, 9)
    scale = weight.detach() if with_optional else None
    opcheck(ops.batch_norm_unpack_grad.registered, (grad, x.detach(), scale, mean, var, *maps, 1e-5, True, "auto"))


def test_compiles_without_graph_breaks():
    grid, inputs = problem(dtype=torch.float32)

    def step(x, weight, bias, token):
        return patch_batch_norm_unpack(x * 2, grid, weight, bias, None, None, token).square().sum()

    eager = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other)


def test_no_rows_give_the_token_and_leave_the_running_statistics():
    grid, (x, weight, bias, token) = problem(torch.zeros(2, 2, 3, dtype=torch.bool))
    mean, var = statistics()
    y = patch_batch_norm_unpack(x, grid, weight, bias, mean, var, token, True)
    assert torch.equal(y, token[:, None, None].expand(2, CHANNELS, 4, 9))
    assert torch.equal(mean, statistics()[0])
    assert torch.equal(var, statistics()[1])
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias, token))
    assert gradients[0].shape == x.shape
    assert not gradients[1].any()
    assert not gradients[2].any()
    assert torch.equal(gradients[3], torch.full((CHANNELS,), 72.0, dtype=torch.float64))


def test_a_masked_gradient_that_is_nan_reaches_the_token_only():
    grid, inputs = problem()
    y = patch_batch_norm_unpack(inputs[0], grid, inputs[1], inputs[2], None, None, inputs[3])
    hidden = ~unpack(torch.ones_like(inputs[0].detach()), grid).bool()
    *seen, token = torch.autograd.grad(y, inputs, torch.ones_like(y).masked_fill(hidden, torch.nan))
    assert all(g.isfinite().all() for g in seen)
    assert token.isnan().all()


def test_bad_arguments_are_named():
    grid, (x, *_) = problem()
    with pytest.raises(ValueError, match="N=4 active patches"):
        patch_batch_norm_unpack(x[:3], grid, None, None, None, None)
    with pytest.raises(ValueError, match=r"fill must have one value per channel \(5\)"):
        patch_batch_norm_unpack(x, grid, None, None, None, None, torch.zeros(4))
    single = PatchGrid.random(1, (2, 2), 1)
    with pytest.raises(ValueError, match="more than one value per channel"):
        patch_batch_norm_unpack(torch.zeros(1, CHANNELS, 1, 1), single, None, None, None, None)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run batch_norm_unpack: "):
        patch_batch_norm_unpack(x, grid, None, None, None, None, backend="triton")
