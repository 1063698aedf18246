"""Activation checkpointing recomputes in backward, after bind() has ended: it must find the grid again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchsparse import PatchGrid, bind, pack, sparsify
from patchsparse.adoption.binding import bindings_of

from .sparsify_cases import UNEQUAL, encoder, images, loss_of

OTHER = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 0, 1]]], dtype=torch.bool)
SAME_COUNT = torch.tensor([[[0, 1, 1], [1, 1, 0]], [[1, 0, 0], [0, 1, 0]]], dtype=torch.bool)


class Blocks(nn.Module):
    """Three convolutional blocks, each one a checkpointed segment if asked for."""

    def __init__(self, mode: str):
        super().__init__()
        torch.manual_seed(0)
        widths = (3, 8, 8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(2, o), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
            for i, o in pairwise(widths)
        )
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.mode == "plain":
                x = block(x)
            else:
                y: Any = checkpoint(block, x, use_reentrant=self.mode == "reentrant")
                x = y
        return x


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def blocks(mode: str) -> nn.Module:
    return sparsify(Blocks(mode).double(), verify=True) if mode == "plain" else sparsify(Blocks(mode).double())


def forward(model: nn.Module, active: Tensor, **options: Any) -> Tensor:
    grid = PatchGrid.from_active(active)
    x = pack(images(active, 8), grid).requires_grad_()
    with bind(model, grid, **options):
        return loss_of([model(x)])


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("other", [OTHER, SAME_COUNT], ids=["other count", "same count"])
def test_two_grids_before_one_backward(mode: str, other: Tensor) -> None:
    plain, saving = blocks("plain"), blocks(mode)
    expected = gradients(plain, lambda: forward(plain, UNEQUAL) + 2 * forward(plain, other))
    ours = gradients(
        saving,
        lambda: forward(saving, UNEQUAL, checkpointing=True) + 2 * forward(saving, other, checkpointing=True),
    )
    assert len(ours) == len(expected) == 12
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert bindings_of(saving)[0].replay is None


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_backward_under_another_grid_and_inside_the_block(mode: str) -> None:
    plain, saving = blocks("plain"), blocks(mode)
    expected = gradients(plain, lambda: forward(plain, UNEQUAL))

    def run() -> Tensor:
        return forward(saving, UNEQUAL, checkpointing=True)

    saving.zero_grad()
    loss = run()
    with bind(saving, PatchGrid.from_active(SAME_COUNT)):
        loss.backward()
    for parameter, b in zip(saving.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_an_unknown_grid_is_an_error_and_not_the_dense_path(mode: str) -> None:
    model = blocks(mode)
    loss = forward(model, UNEQUAL)  # nothing tells bind() about the checkpoints
    with pytest.raises(RuntimeError, match="checkpointing=True"):
        loss.backward()
    ours = gradients(model, lambda: forward(model, UNEQUAL, checkpointing=True))  # and one can go on
    plain = blocks("plain")
    expected = gradients(plain, lambda: forward(plain, UNEQUAL))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_the_dense_model_may_be_checkpointed_after_packed_training(mode: str) -> None:
    plain, saving = blocks("plain"), blocks(mode)
    x = images(UNEQUAL, 8).requires_grad_()
    gradients(saving, lambda: forward(saving, UNEQUAL, checkpointing=True))
    forward(saving, UNEQUAL)
    expected = gradients(plain, lambda: loss_of([plain(x)]))
    ours = gradients(saving, lambda: loss_of([saving(x)]))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_an_exception_in_backward_leaves_nothing_behind() -> None:
    model = blocks("reentrant")
    loss = forward(model, UNEQUAL, checkpointing=True)
    binding = bindings_of(model)[0]

    def fail(gradient: Tensor) -> Tensor:
        raise KeyError("stop")

    handle = next(model.parameters()).register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    x = images(OTHER, 8).requires_grad_()
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    with bind(model, PatchGrid.from_active(OTHER)):
        assert binding.replay is None


def test_what_backward_needs_may_not_be_changed_in_place_though_hooks_keep_it() -> None:
    model = sparsify(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid()).double())
    grid = PatchGrid.from_active(UNEQUAL)
    with bind(model, grid, checkpointing=True):
        output = model(pack(images(UNEQUAL, 8), grid))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.mul_(2).sum().backward()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_timm_models_with_grad_checkpointing(name: str) -> None:
    """timm's switch is found without being told."""
    plain = encoder(name, features_only=False, num_classes=4)
    saving = sparsify(copy.deepcopy(plain))
    sparsify(plain)
    saving.set_grad_checkpointing(True)  # type: ignore[operator]

    def run(model: Any, active: Tensor) -> Tensor:
        grid = PatchGrid.from_active(active)
        x = pack(images(active, 32), grid).requires_grad_()
        with bind(model, grid):
            return loss_of([model.forward_features(x)])

    expected = gradients(plain, lambda: run(plain, UNEQUAL) + run(plain, SAME_COUNT))
    ours = gradients(saving, lambda: run(saving, UNEQUAL) + run(saving, SAME_COUNT))
    largest = max(float(b.abs().max()) for b in expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.rest
# Dynamo asks a non-leaf input for its .grad and relies on a warning filter, which "error" defeats.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_checkpoints_inside_and_outside_of_compiled_code() -> None:
    torch._dynamo.reset()
    plain, saving = blocks("plain"), blocks("not reentrant")
    for block in saving.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")  # regional compilation: the checkpoint is outside
    expected = gradients(plain, lambda: forward(plain, UNEQUAL) + forward(plain, SAME_COUNT))
    ours = gradients(
        saving,
        lambda: forward(saving, UNEQUAL, checkpointing=True) + forward(saving, SAME_COUNT, checkpointing=True),
    )
    whole = blocks("not reentrant")
    compiled: Any = torch.compile(whole, backend="aot_eager")
    inside = gradients(
        whole,
        lambda: forward(compiled, UNEQUAL, checkpointing=True) + forward(compiled, SAME_COUNT, checkpointing=True),
    )
    for a, b, c in zip(ours, expected, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(c, b, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
