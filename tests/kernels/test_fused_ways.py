"""When norm and activation are called one by one all the same; and hooks, copies, compilers, checkpoints, processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchsparse import PatchGrid, UnsupportedModuleError, bind, join_statistics, pack, sparsify
from patchsparse.adoption.fused import PatchSequential, why_apart
from patchsparse.adoption.fused_timm import PatchBasicBlock
from patchsparse.testing import check_parity

from .ranks import Ranks
from .sparsify_cases import UNEQUAL, as_list, assert_close, encoder, images
from .test_fused import moved, operations, problem

APART = {"native_batch_norm": 2, "add_": 1, "relu_": 2}
IN_ONE = {"batch_norm_act": 2}
FIRST_APART = {"batch_norm_act": 1, "native_batch_norm": 1, "relu_": 1}


def block() -> Any:
    return sparsify(moved(BasicBlock(8, 8)), fuse=True)


def listen(module: nn.Module, seen: list[str]) -> Any:
    return module.register_forward_hook(lambda *_: seen.append(type(module).__name__))


@pytest.mark.parametrize("name", ["bn1", "act1", "drop_block"])
def test_a_hook_is_called_and_taking_it_away_fuses_again(name: str) -> None:
    model, seen = block(), []
    grid, x = problem()
    handle = listen(getattr(model, name), seen)
    assert operations(model, grid, x) == FIRST_APART
    assert len(seen) == 1
    handle.remove()
    assert operations(model, grid, x) == IN_ONE


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_hook"])
def test_other_hooks_are_called(register: str) -> None:
    model, seen = block(), []
    grid, x = problem()
    model.act1.inplace = False  # PyTorch refuses backward hooks before an operation in place
    getattr(model.act1, register)(lambda *_: seen.append(1))
    with bind(model, grid):
        model(x.requires_grad_()).sum().backward()
    assert seen == [1]


def test_a_hook_on_every_module_and_hooks_on_blocks_and_convolutions() -> None:
    model, seen = block(), []
    grid, x = problem()
    for module in (model, model.conv1, model.conv2):
        listen(module, seen)
    assert operations(model, grid, x) == IN_ONE
    assert seen == ["PatchConv2d", "PatchConv2d", "PatchBasicBlock"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert operations(model, grid, x) == APART
    finally:
        handle.remove()


def test_reasons_to_call_modules_one_by_one() -> None:
    model = block()
    x = torch.zeros(3, 8, 4, 4, dtype=torch.float64)
    norm, act = model.bn1, model.act1
    cases: list[tuple[Any, str]] = [
        ((nn.BatchNorm2d(8), act), "BatchNorm2d is not a batch norm that sparsify adopts"),
        ((nn.SyncBatchNorm(8), act), "SyncBatchNorm is not"),
        ((norm, nn.GELU()), "GELU is not among Identity, ReLU, LeakyReLU, SiLU"),
        ((norm, nn.Identity()), "nothing follows the norm"),
        ((norm, act, [nn.Dropout()]), "Dropout stands between"),
        ((norm, act, [], x.float()), "torch.float32 is added to torch.float64"),
    ]
    for arguments, reason in cases:
        assert reason in str(why_apart(x, *arguments))
    assert why_apart(x, norm, act, [nn.Identity()], x) is None
    norm.forward = norm.forward
    assert "a hook" in str(why_apart(x, norm, act))


def test_norms_that_were_converted_to_synchronised_ones_are_called_as_they_are() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    grid, x = problem()
    assert operations(model, grid, x) == APART
    assert isinstance(model.bn1, nn.SyncBatchNorm)


def test_blocks_of_a_derived_class_stay_what_they_are() -> None:
    class Odd(BasicBlock):
        """Only a name."""

    class Norm(nn.BatchNorm2d):
        """Only a name."""

    odd, norm = Odd(8, 8), Norm(8)
    model = sparsify(nn.Sequential(odd, norm, nn.ReLU()).double(), fuse=True)
    assert type(model) is nn.Sequential
    assert (type(odd), type(norm)) == (Odd, Norm)
    assert operations(model, *problem()) == {"native_batch_norm": 3, "add_": 1, "relu_": 2, "relu": 1}


def test_a_sequence_with_a_module_twice_and_a_slice_of_it() -> None:
    act = nn.ReLU()
    plain = nn.Sequential(nn.BatchNorm2d(8), act, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), act, nn.BatchNorm2d(8))
    model = sparsify(copy.deepcopy(plain).double(), fuse=True)
    grid, x = problem()
    assert type(model) is PatchSequential
    assert operations(copy.deepcopy(model), grid, x) == {"batch_norm_act": 2, "native_batch_norm": 1}
    plain.double()
    with bind(model, grid):
        assert_close(model(x), plain(x), 0.0, "output")
        assert_close(model[:2](x), plain[:2](x), 0.0, "slice")


def test_copies_and_pickles_keep_the_way() -> None:
    model = block()
    grid, x = problem()
    with bind(model, grid):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        expected = model(x)
    for clone in copies:
        with bind(clone, grid):
            assert torch.equal(clone(x), expected)
        assert operations(clone, grid, x) == IN_ONE


def test_a_checkpointed_block_has_the_same_gradients() -> None:
    plain = block()
    grid, x = problem()
    results = []
    for again in (False, True):
        model, leaf = copy.deepcopy(plain), x.clone().requires_grad_()
        with bind(model, grid, checkpointing=again):
            y = checkpoint(model, leaf, use_reentrant=False) if again else model(leaf)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_model_with_grad_checkpointing_has_the_same_gradients() -> None:
    plain = sparsify(encoder("resnet10t"), fuse=True)
    grid, x = PatchGrid.from_active(UNEQUAL), pack(images(UNEQUAL, 32), PatchGrid.from_active(UNEQUAL))
    results = []
    for again in (False, True):
        model = copy.deepcopy(plain)
        model.set_grad_checkpointing(again)  # type: ignore[operator]
        leaf = x.clone().requires_grad_()
        with bind(model, grid):
            torch.stack([f.square().mean() for f in model(leaf)]).sum().backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-3, "gradient")


def test_compiles_without_graph_breaks() -> None:
    model = block().float()
    grid, x = problem()
    x = x.float()
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with bind(model, grid):
            run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fuse", [True, False])
def test_second_derivatives_need_modules_one_by_one(fuse: bool) -> None:
    model = sparsify(nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()).double(), fuse=fuse)
    grid, x = problem()
    x.requires_grad_()
    with bind(model, grid):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    if fuse:
        with pytest.raises(RuntimeError, match="first derivatives"):
            first.square().sum().backward()
    else:
        first.square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0


def test_half_precision_under_autocast_stays_near_float32() -> None:
    model = sparsify(encoder("resnet10t").float(), fuse=True)
    grid = PatchGrid.from_active(UNEQUAL)
    x = pack(images(UNEQUAL, 32, dtype=torch.float32), grid)
    with bind(model, grid):
        wide = as_list(model(x))
        with torch.autocast("cpu", torch.bfloat16):
            narrow = as_list(model(x))
    assert narrow[-1].dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(narrow[-1].float().flatten(), wide[-1].flatten(), dim=0) > 0.98


def test_verification_covers_the_way_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def wrong(self: Any, x: Tensor) -> Tensor:
        y = BasicBlock.forward(self, x)
        calls.append(self.fuses(x))
        return 2 * y if calls[-1] else y

    model = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8))
    check_parity(model)
    monkeypatch.setattr(PatchBasicBlock, "forward", wrong)
    with pytest.raises(UnsupportedModuleError, match=r"'1' \(.*BasicBlock\).*sparsify\(model, fuse=False\)"):
        sparsify(model, verify=True)
    assert calls == [False, True]
    sparsify(model, fuse=False, verify=True)


def test_statistics_of_a_model_joined_over_ranks_equal_those_of_the_joint_batch() -> None:
    """Both with norms fused and one by one; ranks have 4 and 1 images of unequal numbers of patches."""
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    source = moved(nn.Sequential(*stem, BasicBlock(8, 8), BatchNormAct2d(8), nn.BatchNorm2d(8)))
    active = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    x, weights = images(active, 8), images(active, 8, 8)

    def step(model: nn.Module, part: slice) -> nn.Module:
        grid = PatchGrid.from_active(active[part])
        with bind(model, grid):
            y = model(pack(x[part], grid))
        (y * pack(weights[part], grid)).sum().backward()
        return model

    joint = step(sparsify(copy.deepcopy(source)), slice(0, 5))
    for fuse in (True, False):

        def on_rank(rank: int, all_gather: Any, fuse: bool = fuse) -> nn.Module:
            model = sparsify(copy.deepcopy(source), fuse=fuse)
            join_statistics(model, all_gather)
            return step(model, (slice(0, 4), slice(4, 5))[rank])

        ranks = Ranks(2)
        models = ranks.run(on_rank)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in source.modules())
        assert len(ranks.exchanged) == 2 * norms
        for model in models:
            for ours, whole in zip(model.buffers(), joint.buffers(), strict=True):
                assert_close(ours.double(), whole.double(), 0.0, "buffer")
        for one, other, whole in zip(*(m.parameters() for m in (*models, joint)), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert whole.grad is not None
            assert_close(one.grad + other.grad, whole.grad, 1.0, "gradient")
