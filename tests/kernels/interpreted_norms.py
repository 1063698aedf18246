"""Fused batch normalisation in Triton's interpreter, against ``gather`` in float64; see ``test_triton.py``."""

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack, patch_batch_norm_act, sparsify

from ..matrix import one_of_each
from .interpreted_triton import _poison, check, normal, results  # noqa: F401
from .ranks import Ranks, replay
from .sparsify_cases import UNEQUAL, images
from .test_fused import moved, operations

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("dtype", "activation"), one_of_each(HALF, ["relu", "silu", "leaky_relu"]))
def test_half_precision_with_a_residual(dtype, activation):
    """The gradient at the residual, in half precision, is what the gradient at x is made of."""
    x, residual, weight, bias = normal(1, (33, 24, 3, 3), (33, 24, 3, 3), (24,), (24,))

    def run(backend: str, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return patch_batch_norm_act(x, w, b, None, None, activation=activation, residual=r, backend=backend)

    check(((x * 3 + 1).to(dtype), residual.to(dtype), weight, bias), run, 4)


@pytest.mark.parametrize("wider", [0, 1])
def test_a_residual_of_another_type(wider):
    operands = list(normal(2, (20, 8, 2, 2), (20, 8, 2, 2)))
    operands[1 - wider] = operands[1 - wider].bfloat16()
    options = (None, None, None, None)
    check(
        tuple(operands), lambda b, x, r: patch_batch_norm_act(x, *options, activation="silu", residual=r, backend=b), 5
    )


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_moments_of_few_and_many_rows(rows):
    """Splits that lack rows, tiles or both: the running statistics are those of PyTorch."""
    (x,) = normal(rows, (rows, 72, 1, 2))
    states = [(torch.zeros(72), torch.ones(72)) for _ in range(2)]
    for state, backend in zip(states, ("triton", "gather"), strict=True):
        patch_batch_norm_act(x * 2 + 5, None, None, *state, True, 1.0, backend=backend)
    for got, expected in zip(*states, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [True, False])
def test_running_statistics_and_batches_in_one_start(dtype, counts):
    """Of more channels than a program has; what is in gaps of memory is left to PyTorch."""
    (x,) = normal(4, (6, 700, 1, 2))
    gaps, batches = torch.full((1400,), 0.5)[::2], torch.tensor(41) if counts else None
    states = [(torch.full((700,), 0.5, dtype=dtype), torch.full((700,), 0.5, dtype=dtype)) for _ in range(2)]
    for state, backend in zip(states, ("triton", "gather"), strict=True):
        patch_batch_norm_act(x + 5, None, None, *state, True, 0.3, backend=backend, batches=batches)
    patch_batch_norm_act(x + 5, None, None, gaps, gaps.clone(), True, 0.3, backend="triton", batches=batches)
    for got, expected in zip(*states, strict=True):
        torch.testing.assert_close(got, expected)
        assert got._version == expected._version == 1
    assert batches is None or batches.tolist() == 44
    torch.testing.assert_close(gaps.to(dtype), states[1][0])


def test_statistics_of_two_ranks():
    """What is sent, and what becomes of what comes back; ranks are threads, which the interpreter cannot have."""
    x, residual, weight, bias = normal(3, (40, 16, 2, 2), (40, 16, 2, 2), (16,), (16,))
    counts = (30, 10)

    def call(backend, all_gather):
        def run(_: str, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
            options = {"activation": "silu", "residual": r, "backend": backend, "all_gather": all_gather}
            return patch_batch_norm_act(x, w, b, None, None, **options)

        return run

    def inputs(rank: int) -> tuple[Tensor, ...]:
        return (x.split(counts)[rank], residual.split(counts)[rank], weight, bias)

    ranks = Ranks(2)
    expected = ranks.run(lambda rank, all_gather: results("", inputs(rank), call("gather", all_gather), rank))
    for rank in range(2):
        got = results("", inputs(rank), call("triton", replay(ranks.exchanged, rank, 1e-4)), rank)
        for ours, theirs in zip(got, expected[rank], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.rest)])
def test_a_model_runs_in_one_where_this_engine_takes_it(training: bool):
    """Unasked: its norms are faster that way. Twice PyTorch's own error in float32, against float64 one by one."""
    down = downsample_conv(8, 16, 1, stride=2)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), BatchNormAct2d(8, act_layer="silu")]
    source = moved(nn.Sequential(*stem, BasicBlock(8, 16, stride=2, downsample=down), Bottleneck(16, 4)))
    x = images(UNEQUAL, 4)
    source(x)  # fills the running statistics
    source.train(training)
    grid, found = PatchGrid.from_active(UNEQUAL), []
    for backend, dtype in (("gather", torch.float64), ("gather", torch.float32), ("triton", torch.float32)):
        model = sparsify(copy.deepcopy(source).to(dtype), backend=backend)
        leaf = pack(x, grid).to(dtype).requires_grad_()
        with bind(model, grid):
            y = model(leaf)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradients = torch.autograd.grad(y, [leaf, *model.parameters()], direction.to(dtype))
        found.append([y, *gradients, *(b for b in model.buffers() if b.is_floating_point())])
    names = [*operations(copy.deepcopy(model), grid, leaf.detach())]
    assert set(names) == {"batch_norm_act", "native_batch_norm"}  # the shortcut's norm has nothing after it
    largest = max(float(e.abs().max()) for e in found[0][1:])
    for exact, plain, ours in zip(*found, strict=True):
        allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * (exact.abs().max() + largest)
        assert (ours - exact).abs().max() <= allowed
