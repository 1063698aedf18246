"""Bytes that norms move, counted on a card that is not there."""

import copy

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from patchsparse import PatchGrid, sparsify

passes = pytest.importorskip("benchmarks.gpu.passes", reason="Triton is not installed")
from benchmarks.gpu.fake import fake_gpu  # noqa: E402


@pytest.mark.parametrize(
    ("block", "apart", "in_one"),
    [
        (BasicBlock(16, 16), 13 + 16, 8 + 11),  # norm + ReLU; norm + shortcut + ReLU
        (Bottleneck(64, 16), 13 / 4 + 13 / 4 + 16, 8 / 4 + 8 / 4 + 11),  # two maps of a quarter of the channels
    ],
)
def test_passes_over_the_map_of_a_block(block: nn.Module, apart: float, in_one: float) -> None:
    with fake_gpu(hollow=True, compiles=False):
        grid = PatchGrid.random(2, (4, 4), keep=0.5).to("cuda")
        x = torch.zeros(16, 8, 8, 16 if isinstance(block, BasicBlock) else 64, dtype=torch.bfloat16, device="cuda")
        found = []
        for fuse in (False, None):
            model = sparsify(nn.Sequential(copy.deepcopy(block)), fuse=fuse).to("cuda", torch.bfloat16)
            found.append(passes.traffic(model, x.permute(0, 3, 1, 2), grid))
    size = x.numel() * 2
    assert [seen.moved / size for seen in found] == [apart, in_one]
    assert found[1].operators.total() == 0
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert found[1].launches.total() == 6 * norms  # three passes each way, two of them over maps
