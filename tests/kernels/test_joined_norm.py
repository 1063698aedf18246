"""Batch statistics of several processes, with unequal numbers of rows: the same as of one joint batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchsparse import PatchGrid, patch_batch_norm_act, patch_batch_norm_unpack
from patchsparse.ops.joined_norm import joined_moments

from .ranks import Ranks

CHANNELS = 5
COUNTS = [(4, 3), (6, 0, 1), (0, 0)]  # patches of each rank


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) * 3 + 10 for s in shapes]


def step(run, inputs: list[Tensor], parameters: list[Tensor], direction: Tensor) -> dict[str, list[Tensor]]:
    """Return what a forward and a backward pass give, in groups that ranks put together alike."""
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, *parameters)]
    running = [torch.full((CHANNELS,), value, dtype=torch.float64) for value in (0.3, 2.0)]
    y = run(leaves, running)
    gradients = torch.autograd.grad(y, leaves, direction)
    return {"rows": [y.detach(), *gradients[: len(inputs)]], "sums": [*gradients[len(inputs) :]], "same": running}


def assert_equal_to_joint(parts: list[dict[str, list[Tensor]]], joint: dict[str, list[Tensor]]) -> None:
    for n, whole in enumerate(joint["rows"]):
        torch.testing.assert_close(torch.cat([part["rows"][n] for part in parts]), whole, rtol=1e-10, atol=1e-10)
    for n, whole in enumerate(joint["sums"]):
        total = torch.stack([part["sums"][n] for part in parts]).sum(0)
        torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-10)
    for part in parts:
        for ours, first, whole in zip(part["same"], parts[0]["same"], joint["same"], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-10)
            assert torch.equal(ours, first)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_norm_of_several_ranks_equals_the_joint_batch(counts, activation):
    total = sum(counts)
    x, residual, direction = normal(*[(total, CHANNELS, 2, 3)] * 3)
    parameters = normal((CHANNELS,), (CHANNELS,), seed=1)

    def call(all_gather=None):
        def run(leaves, running):
            x, residual, weight, bias = leaves
            options = {"activation": activation, "residual": residual, "all_gather": all_gather}
            mean, var = running
            return patch_batch_norm_act(x, weight, bias, mean, var, True, 0.2, **options)

        return run

    ranks = Ranks(len(counts))
    parts = [list(t.split(counts)) for t in (x, residual, direction)]

    def on_rank(rank, all_gather):
        x, residual, direction = (part[rank] for part in parts)
        return step(call(all_gather), [x, residual], parameters, direction)

    assert_equal_to_joint(ranks.run(on_rank), step(call(), [x, residual], parameters, direction))
    assert [t.shape for t in ranks.exchanged] == [(len(counts), 2 * CHANNELS + 1), (len(counts), 2 * CHANNELS)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_norm_and_unpack_of_several_ranks_equals_the_joint_batch(counts):
    active = torch.zeros(len(counts), 2, 3, dtype=torch.bool)  # an image for each rank
    for image, count in zip(active, counts, strict=True):
        image.flatten()[:count] = True
    x, direction = normal((sum(counts), CHANNELS, 2, 2), (len(counts), CHANNELS, 4, 6))
    parameters = normal((CHANNELS,), (CHANNELS,), (CHANNELS,), seed=1)

    def call(grid, all_gather=None):
        def run(leaves, running):
            x, weight, bias, token = leaves
            mean, var = running
            return patch_batch_norm_unpack(x, grid, weight, bias, mean, var, token, True, 0.2, all_gather=all_gather)

        return run

    def on_rank(rank, all_gather):
        grid = PatchGrid.from_active(active[rank : rank + 1])
        return step(call(grid, all_gather), [x.split(counts)[rank]], parameters, direction[rank : rank + 1])

    ranks = Ranks(len(counts))
    joint = step(call(PatchGrid.from_active(active)), [x], parameters, direction)
    assert_equal_to_joint(ranks.run(on_rank), joint)
    assert len(ranks.exchanged) == 2


def test_nothing_is_exchanged_where_running_statistics_are_used():
    (x,) = normal((3, CHANNELS, 2, 2))
    mean, var = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)

    def fail(part: Tensor) -> Tensor:
        raise AssertionError("exchanged")

    alone = patch_batch_norm_act(x, None, None, mean, var)
    assert torch.equal(patch_batch_norm_act(x, None, None, mean, var, all_gather=fail), alone)


def test_one_value_per_channel_is_enough_where_ranks_are_joined():
    (x,) = normal((2, CHANNELS, 1, 1))
    joined = Ranks(2).run(
        lambda rank, all_gather: patch_batch_norm_act(x[rank : rank + 1], None, None, None, None, all_gather=all_gather)
    )
    torch.testing.assert_close(torch.cat(joined), patch_batch_norm_act(x, None, None, None, None))


def test_moments_of_far_off_values_keep_their_digits():
    x = normal((4, 1000))[0].float() + 1e4
    parts = torch.stack(
        [torch.cat((row.mean()[None], row.var(correction=0)[None], row.new_tensor([1000]))) for row in x]
    )
    mean, var, count = joined_moments(parts[0, :1], parts[0, 1:2], 1000, lambda part: parts)
    exact = x.double()
    assert count == 4000
    torch.testing.assert_close(mean.double()[0], exact.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double()[0], exact.var(correction=0), rtol=1e-3, atol=0)


def test_a_second_derivative_is_refused():
    (x,) = normal((3, CHANNELS, 2, 2))
    x.requires_grad_()
    y = patch_batch_norm_act(x, None, None, None, None, all_gather=lambda part: part[None])
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
