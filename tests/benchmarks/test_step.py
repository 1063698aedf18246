"""A training step on a fake GPU: how many kernels it starts, and that CUDA graphs are asked for as PyTorch has them."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from triton import knobs

from benchmarks.gpu import step
from benchmarks.gpu.fake import fake_gpu
from spatspark_fast.training import captured
from spatspark_fast.training.captured import CapturedStep, Inputs
from spatspark_fast.training.cuda_graphs import CudaGraphs, choose_graphs
from spatspark_fast.training.lamb import Lamb

ROOT = Path(__file__).parents[2]
compiles = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET=1 runs kernels in Python")


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 36, 4, 1),
        ([1] * 73, 4, 3),
        ([320 << 16], 2, 1),
        ([(320 << 16) + 1], 2, 2),
        ([], 1, 0),
    ],
)
def test_lists_of_tensors_are_cut_as_pytorch_cuts_them(sizes, lists, launches):
    assert step.list_launches(sizes, lists) == launches


class Product(nn.Module):
    """Learn a product with the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def loss(self, frames: Tensor, noise: object, counts: tuple[int, ...]) -> Tensor:
        """Return a loss with a place in it that ``counts`` name."""
        return (frames @ self.weight.T).square().sum() * counts[0]


def trained(steps: int) -> tuple[CapturedStep, list[str]]:
    """Train a product by captured steps on a fake GPU."""
    said: list[str] = []
    with fake_gpu("h100", compiles=False):
        model = Product()
        graphs = choose_graphs("auto", torch.device("cuda", 0), 1, said.append)
        assert isinstance(graphs, CudaGraphs)
        taking = CapturedStep(model, model.loss, Lamb(model.parameters(), lr=0.1), graphs, clip=1.0, say=said.append)
        for number in range(steps):
            taken = taking(Inputs(torch.rand(8, 3), (torch.rand(8),), (1,), "a product"))
            assert taken.norm is not None, number
        return taking, said


@compiles
def test_a_graph_that_computes_nothing_is_refused():
    """The fake GPU replays nothing, which is what a graph that lost its kernels would do."""
    taking, said = trained(5)
    assert taking.given_up
    assert taking.replayed == 0
    assert len(said) == 1
    assert "the first replay differs from the step kernel by kernel" in said[0]
    assert "weights by" in said[0]


@compiles
def test_graphs_are_captured_and_replayed():
    nothing = mock.Mock(return_value=[])
    with mock.patch.multiple(captured, differences=nothing, ways_apart=nothing):
        taking, said = trained(6)
    assert nothing.call_count == 2
    assert said == ["Captured a training step as a graph: a product; 1 kept"]
    assert taking.replayed == 3


@compiles
def test_a_capture_that_fails_ends_in_a_line():
    def fails(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    with mock.patch("benchmarks.gpu.fake_cuda.CUDAGraph.capture_begin", fails):
        taking, said = trained(5)
    assert taking.replayed == 0
    assert said == [
        "Training steps run kernel by kernel, without a CUDA graph: RuntimeError: operation not permitted when stream "
        "is capturing"
    ]


@pytest.mark.rest
@compiles
def test_the_table_of_two_checkouts(capsys):
    assert step.main(["--decoders", "light", "--no-times", "--against", str(ROOT)]) == 0
    found = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    ways = [row[3].strip() for row in found]
    assert ways == ["step", "its clipping and LAMB", "captured step"] * 2
    for row in found:
        torchs, tritons, graphs = (int(cell) for cell in row[4:7])
        assert graphs == (row[3].strip() == "captured step")
        assert torchs > 0
        assert (torchs + tritons < 5) == bool(graphs)
