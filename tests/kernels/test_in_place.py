"""What a user does to a result in place: the same gradients as out of place, or autograd's own refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import PatchGrid, available_backends, bind, pack, sparsify
from patchsparse.testing import DenseAndMask

from ..matrix import rest_but
from .dispatched import Dispatched
from .public_calls import CALLS, COMPUTING, PublicCall, inputs_of
from .sparsify_cases import as_list, assert_same_gradients, images

ENGINES = [name for name in available_backends() if name != "triton"]  # interpreted_triton.py has that one
CHANGES: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "silu": lambda y, inplace: F.silu(y, inplace),
    "sum and product": lambda y, inplace: y.add_(1).mul_(y.detach() + 2) if inplace else (y + 1) * (y.detach() + 3),
}


def gradients(call: PublicCall, backend: str, change: Callable[[Tensor], Tensor], way: str) -> list[Tensor]:
    """Return the changed result and the gradients at all inputs."""
    inputs = inputs_of(call)

    def compute(*tensors: Tensor) -> Tensor:
        return change(call.run(backend, *tensors))

    if way == "compiled":
        torch._dynamo.reset()
        compute = torch.compile(compute, backend="aot_eager", fullgraph=True)
    with Dispatched() if way == "registered" else nullcontext():
        changed = compute(*inputs)
    direction = torch.linspace(-1, 2, changed.numel(), dtype=changed.dtype).view(changed.shape)
    return [changed.detach().clone(), *torch.autograd.grad(changed, inputs, direction)]


def cases() -> list[Any]:
    rows = [(n, b, w) for n in CALLS for b in ENGINES for w in ("eager", "registered", "compiled")]
    rows = [row for row in rows if not ("joined" in row[0] and row[2] == "compiled")]  # eager only
    default = [row for row in rows if row[2] == "eager" or (row[2] == "registered" and row[1] == "gather")]
    default += [(n, "gather", "compiled") for n in ("pack", "unpack, fill", "conv, one channel", "norm, images")]
    return rest_but(default, rows)


def test_the_table_has_every_function_that_computes() -> None:
    assert {call.function for call in CALLS.values()} == COMPUTING


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "backend", "way"), cases())
def test_in_place_is_as_out_of_place(name: str, backend: str, way: str, change: str) -> None:
    call, changed = CALLS[name], CHANGES[change]
    expected = gradients(call, backend, lambda y: changed(y, False), "eager")
    found = gradients(call, backend, lambda y: changed(y, True), way)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_results_of_operators_are_no_views_whether_differentiated_or_not(name: str) -> None:
    call = CALLS[name]
    with torch.no_grad():
        result = call.run("gather", *inputs_of(call))
    assert not result._is_view() or name == "conv, 1x1"  # PyTorch's own product of matrices
    result = call.run("gather", *inputs_of(call))
    scale = torch.ones(result.shape, dtype=result.dtype, requires_grad=True)
    result.mul_(scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("name", rest_but(["vgg11"], ["vgg11", "vgg11_bn", "nfnet_l0"]))
def test_timm_models_of_in_place_activations_train(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, features_only=True).double().train()
    grid = PatchGrid.from_active(torch.tensor([[[1, 0, 1]], [[0, 1, 1]]], dtype=torch.bool))
    reference, ours = DenseAndMask(model, grid), sparsify(copy.deepcopy(model))
    x = images(grid.active, 32, 1)
    with bind(ours, grid):
        features = as_list(ours(pack(x, grid)))
    expected = [pack(feature, grid) for feature in as_list(reference(x))]
    for some in (features, expected):
        torch.stack([(f - 0.1).square().mean() for f in some]).sum().backward()
    assert any(getattr(module, "inplace", False) for module in model.modules())
    assert_same_gradients(ours, reference.model)
