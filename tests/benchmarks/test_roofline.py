"""What the roofline counts, and the floors that follow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure.ceilings import Ceilings, measure_ceilings, optimiser_seconds
from benchmarks.measure.work import Counted, Work, counted
from benchmarks.reports.roofline import lines
from benchmarks.subjects.convolutions import Problem, Shape, operators, problem

CEILINGS = Ceilings("cpu", copy=1e9, rate={torch.float32: 1e10})


def small(shape: Shape, masked: float) -> Problem:
    return problem(shape, masked, 2, torch.float32, "cpu", (3, 3))


@pytest.mark.parametrize("shape", [Shape(2, 6, 4), Shape(4, 5, 8, stride=2), Shape(2, 8, 8, k=7, groups=8)], ids=str)
def test_active_pairs_are_counted_in_all_passes(shape: Shape) -> None:
    """Pairs found by looking at each tap of each pixel of a mask of ones and zeros."""
    p = small(shape, 0.5)
    mask = p.grid.pixels((3 * shape.p, 3 * shape.p))[:, None].float()
    taps = F.conv2d(mask, torch.ones(1, 1, shape.k, shape.k), None, shape.stride, shape.k // 2)
    active = p.grid.pixels((3 * shape.out_p, 3 * shape.out_p))[:, None]
    pairs = int((taps * active).sum())
    macs = pairs * shape.c_out * shape.c_in // shape.groups
    assert p.pairs == pairs
    assert p.work(("fwd",)).macs == macs
    for run in operators(p, "gather").values():
        (layer,) = counted(run)
        assert layer.work.macs == macs
        assert layer.work.bytes == p.work(("fwd",)).bytes


def test_everything_visible_leaves_out_the_padding_alone() -> None:
    p = small(Shape(2, 6, 4), 0.0)
    side = 6
    assert p.pairs == 2 * (3 * side - 2) ** 2
    (layer,) = counted(operators(p, "dense")["fwd"])
    assert layer.work.macs == 2 * side**2 * 9 * 6 * 4 == pytest.approx(p.limit * p.pairs * 24)


def test_dense_layers_and_their_gradients_are_counted() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight, spread, matrix = torch.randn(5, 3, 3, 3), torch.randn(5, 4, 4, 4), torch.randn(16, 7)
    for parameter in (weight, spread, matrix):
        parameter.requires_grad_()

    def step() -> None:
        y = F.conv_transpose2d(F.conv2d(x, weight, padding=1), spread, stride=2, padding=1)
        (y.flatten(0, 2) @ matrix).sum().backward()

    found = [(layer.name, layer.work.macs) for layer in counted(step)]
    conv, up, product = 2 * 64 * 9 * 15, 2 * 64 * 16 * 20, 2 * 4 * 16 * 16 * 7
    assert found == [
        ("convolution", conv), ("convolution", up), ("mm", product), ("mm", product), ("mm", product),
        ("convolution_backward", 2 * up), ("convolution_backward", 2 * conv),
    ]  # fmt: skip


def test_the_floor_is_the_larger_of_both_times() -> None:
    assert CEILINGS.floor(Work(1e10, 1e8), torch.float32) == 1.0
    assert CEILINGS.floor(Work(1e9, 1e9), torch.float32) == 1.0
    layers = [Counted("conv2d", "1x1", torch.float32, Work(1e10, 1)), Counted("mm", "1x1", torch.float32, Work(1, 2e9))]
    assert CEILINGS.total(layers) == 3.0
    table = list(lines(CEILINGS, layers))
    assert "1000.000 ms by products" in table[0]
    assert "2000.000 ms by bytes" in table[1]
    assert optimiser_seconds(CEILINGS, torch.nn.Linear(10, 10, bias=False)) == pytest.approx(7 * 400 / 1e9)


def test_both_ceilings_are_measured() -> None:
    found = measure_ceilings(torch.device("cpu"), copy_bytes=2**20, side=64, rounds=2)
    assert 1e7 < found.copy < 1e13
    assert set(found.rate) == {torch.float32, torch.bfloat16}
    assert all(1e5 < rate < 1e15 for rate in found.rate.values())
