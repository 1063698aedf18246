"""Fused batch normalisation in Triton's interpreter, against ``gather`` in float64; see ``test_triton.py``."""

import pytest
import torch
from torch import Tensor

from patchsparse import patch_batch_norm_act

from ..matrix import one_of_each
from .interpreted_triton import _poison, check, normal, results  # noqa: F401
from .ranks import Ranks, replay

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
