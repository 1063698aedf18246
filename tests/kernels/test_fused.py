"""Norm, shortcut and activation as one operator in sparsified models: the same numbers, in fewer operations."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.squeeze_excite import SEModule
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from patchsparse import PatchGrid, bind, pack, sparsify
from patchsparse.adoption.fused import PatchNorm

from ..matrix import rest_but
from .sparsify_cases import UNEQUAL, assert_close, assert_parity, encoder, images, loss_of
from .test_sparsify_models import EXACT

WATCHED = ("native_batch_norm", "batch_norm_act", "add_", "add", "relu_", "relu", "silu_")


class Counting(TorchDispatchMode):
    """Count the operations that norms, shortcuts and activations consist of."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WATCHED and args[0].dim() == 4:  # not the number of batches
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def problem(channels: int = 8, patch: int = 4) -> tuple[PatchGrid, Tensor]:
    grid = PatchGrid.from_active(UNEQUAL)
    return grid, pack(images(UNEQUAL, patch, channels), grid)


def operations(model: nn.Module, grid: PatchGrid, x: Tensor) -> dict[str, int]:
    with Counting() as counting, bind(model, grid):
        model(x)
    return dict(counting.counts)


def moved(model: nn.Module) -> nn.Module:
    """Return ``model`` in float64 with scales that are neither 0 nor 1."""
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.2, 0.8)
    return model


WITH_NORMS = [name for name in EXACT if not name.startswith(("convnext", "poolformer", "resnetv2"))]


@pytest.mark.parametrize("name", rest_but(["resnet18"], [*WITH_NORMS, "dla34", "resnet50d", "ghostnet_100"]))
def test_model_in_one_equals_dense_and_mask(name: str) -> None:
    assert_parity(encoder(name), UNEQUAL, 32, fuse=True)


def test_eval_mode_in_one_uses_running_statistics() -> None:
    model = encoder("regnetx_002")
    model(images(UNEQUAL, 32))  # fills the running statistics
    assert_parity(model.eval(), UNEQUAL, 32, fuse=True)


def blocks() -> dict[str, tuple[nn.Module, dict[str, int], dict[str, int]]]:
    """Return blocks of 8 channels with their operations one by one, and in one where that is possible."""
    down: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "kernel_size": 1}
    pool = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    regnet: dict[str, Any] = {"in_chs": 8, "out_chs": 8, "se_ratio": 0}
    return {
        "basic": (
            BasicBlock(8, 8),
            {"native_batch_norm": 2, "add_": 1, "relu_": 2},
            {"batch_norm_act": 2},
        ),
        "basic, stride 2": (
            BasicBlock(8, 8, stride=2, downsample=downsample_conv(**down, stride=2)),
            {"native_batch_norm": 3, "add_": 1, "relu_": 2},
            {"batch_norm_act": 2, "native_batch_norm": 1},
        ),
        "basic, drop path": (
            BasicBlock(8, 8, drop_path=DropPath(0.5)),
            {"native_batch_norm": 2, "add_": 1, "relu_": 2},
            {"batch_norm_act": 1, "native_batch_norm": 1, "add_": 1, "relu_": 1},
        ),
        "basic, squeeze-and-excite": (
            BasicBlock(8, 8, attn_layer=SEModule),
            {"native_batch_norm": 2, "add_": 1, "relu_": 3},
            {"batch_norm_act": 1, "native_batch_norm": 1, "add_": 1, "relu_": 2},
        ),
        "basic, anti-aliasing": (
            BasicBlock(8, 8, stride=2, aa_layer=nn.AvgPool2d, downsample=downsample_avg(**down, stride=2)),
            {"native_batch_norm": 3, "add_": 1, "relu_": 2},
            {"batch_norm_act": 2, "native_batch_norm": 1},
        ),
        "basic, another activation": (
            BasicBlock(8, 8, act_layer=nn.Hardtanh),
            {"native_batch_norm": 2, "add_": 1},
            {"native_batch_norm": 2, "add_": 1},
        ),
        "bottleneck, grouped": (
            Bottleneck(8, 2, cardinality=2, base_width=64),
            {"native_batch_norm": 3, "add_": 1, "relu_": 3},
            {"batch_norm_act": 3},
        ),
        "regnet": (
            RegNetBottleneck(**regnet),
            {"native_batch_norm": 3, "relu_": 2, "add": 1, "relu": 1},
            {"batch_norm_act": 3},
        ),
        "regnet, linear out, drop path": (
            RegNetBottleneck(**regnet, linear_out=True, drop_path_rate=0.5),
            {"native_batch_norm": 3, "relu_": 2, "add": 1},
            {"batch_norm_act": 2, "native_batch_norm": 1, "add_": 1},
        ),
        "sequence": (pool, {"native_batch_norm": 2, "relu": 1}, {"batch_norm_act": 1, "native_batch_norm": 1}),
        "norm with activation": (
            nn.Sequential(BatchNormAct2d(8, act_layer="silu"), BatchNormAct2d(8, apply_act=False)),
            {"native_batch_norm": 2, "silu_": 1},
            {"batch_norm_act": 1, "native_batch_norm": 1},
        ),
    }


@pytest.mark.parametrize("name", blocks())
def test_operations_and_numbers_of_a_block(name: str) -> None:
    block, apart, in_one = blocks()[name]
    grid, x = problem()
    ways = [sparsify(copy.deepcopy(moved(block)), fuse=fuse) for fuse in (False, True)]
    assert [operations(copy.deepcopy(way), grid, x) for way in ways] == [apart, in_one]
    results = []
    for way in ways:
        leaf = x.detach().clone().requires_grad_()
        torch.manual_seed(0)  # of drop path
        with bind(way, grid):
            y = way(leaf)
        loss_of([y]).backward()
        gradients = [p.grad for p in way.parameters()]
        results.append([y, leaf.grad, *gradients, *way.buffers()])
    assert [list(way.state_dict()) for way in ways] == [list(block.state_dict())] * 2
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        assert_close(one, other, 1e-6, str(number))


def test_on_a_cpu_and_without_a_grid_modules_are_called_one_by_one() -> None:
    block, apart, _ = blocks()["basic"]
    grid, x = problem()
    assert operations(sparsify(copy.deepcopy(block).double()), grid, x) == apart
    model = sparsify(copy.deepcopy(block).double(), fuse=True)
    with Counting() as counting:
        dense = model(x)
    assert counting.counts == apart
    assert torch.equal(dense, copy.deepcopy(block).double()(x))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False, "momentum": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_every_setting_of_a_batch_norm(options: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(8, **options), nn.LeakyReLU(0.2)).double()
    grid, x = problem()
    plain(x + 1)
    plain.train(training)
    model = sparsify(copy.deepcopy(plain), fuse=True)
    with bind(model, grid):
        for step in range(3):
            assert_close(model(x * (step + 1)), plain(x * (step + 1)), 0.0, "output")
    assert operations(model, grid, x) == {"batch_norm_act": 1}
    plain(x)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert_close(ours.double(), theirs.double(), 0.0, "buffer")


def test_norms_that_are_frozen_inside_training() -> None:
    block = moved(BasicBlock(8, 8))
    grid, x = problem()
    with torch.no_grad():
        block(x)
    ways = [sparsify(copy.deepcopy(block), fuse=fuse).train() for fuse in (False, True)]
    gradients = []
    for way in ways:
        for module in way.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        with bind(way, grid):
            loss_of([way(x)]).backward()
        gradients.append([way.conv1.weight.grad, way.conv2.weight.grad])  # type: ignore[union-attr]
        assert all(p.grad is None for m in way.modules() if isinstance(m, PatchNorm) for p in m.parameters())
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 0.0, "gradient")
