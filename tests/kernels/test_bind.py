"""bind: nesting, independence, wrapping, and compiled steps without recompilation."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from patchsparse import PatchGrid, bind, pack, sparsify
from patchsparse.adoption.binding import bindings_of

from .sparsify_cases import UNEQUAL, as_list, encoder, images, loss_of

SMALL: dict[str, Any] = {"out_indices": (0, 1)}


def grids(count: int, keep: float = 0.5) -> list[PatchGrid]:
    return [PatchGrid.random(2, (2, 3), keep, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(as_list(ours), as_list(theirs), strict=True))


def test_a_model_that_is_not_sparsified_or_a_wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="call sparsify"), bind(nn.Conv2d(3, 3, 3), grids(1)[0]):
        pass
    with pytest.raises(TypeError, match="PatchGrid"), bind(sparsify(nn.Conv2d(3, 3, 1)), UNEQUAL):  # type: ignore[arg-type]
        pass


def test_a_dense_or_foreign_tensor_is_named_with_its_module() -> None:
    model = sparsify(encoder("resnet18", **SMALL))
    grid, other = grids(1)[0], PatchGrid.from_active(UNEQUAL[:1])
    for wrong in (images(UNEQUAL, 32), pack(images(UNEQUAL[:1], 32), other)):
        with bind(model, grid), pytest.raises(ValueError, match=r"conv1: .*6 active patches.*pack\(x, grid\)"):
            model(wrong)


def _fail_on(model: nn.Module, grid: PatchGrid) -> None:
    assert bindings_of(model)[0].grid is grid
    raise KeyError


def test_blocks_nest_and_restore_also_after_an_exception() -> None:
    model = sparsify(encoder("resnet18", **SMALL)).eval()
    binding = bindings_of(model)[0]
    outer, inner = grids(2)
    x = images(UNEQUAL, 32)
    dense = model(x)
    with bind(model, outer):
        first = model(pack(x, outer))
        with pytest.raises(KeyError), bind(model, inner):
            _fail_on(model, inner)
        assert binding.grid is outer
        with bind(model, inner), bind(model, inner):
            model(pack(x, inner))
        with bind(model, None):
            assert same(model(x), dense)
        assert same(model(pack(x, outer)), first)
    assert binding.grid is None
    assert same(model(x), dense)


def test_two_models_with_two_grids_alternate() -> None:
    a, b = sparsify(encoder("resnet18", **SMALL)).eval(), sparsify(encoder("regnety_002", **SMALL)).eval()
    x = images(UNEQUAL, 32)
    one, two = grids(1, 0.5)[0], PatchGrid.from_active(UNEQUAL)
    with bind(a, one):
        alone_a = a(pack(x, one))
    with bind(b, two):
        alone_b = b(pack(x, two))
    with bind(a, one), bind(b, two):
        assert same(b(pack(x, two)), alone_b)
        assert same(a(pack(x, one)), alone_a)
        assert same(b(pack(x, two)), alone_b)


def test_a_parent_binds_all_its_sparsified_parts() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    parts = nn.Sequential(sparsify(copy.deepcopy(conv)), nn.ReLU(), sparsify(copy.deepcopy(conv)))
    whole = sparsify(nn.Sequential(copy.deepcopy(conv), nn.ReLU(), copy.deepcopy(conv)))
    grid = grids(1)[0]
    x = pack(images(UNEQUAL, 8), grid)
    assert len(bindings_of(parts)) == 2
    with bind(parts, grid), bind(whole, grid):
        assert same(parts(x), whole(x))


def test_a_model_without_any_spatial_module_can_be_bound() -> None:
    model = sparsify(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    grid = grids(1)[0]
    with bind(model, grid):
        assert model(pack(images(UNEQUAL, 8, dtype=torch.float32), grid)).shape == (6, 4, 8, 8)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    alone = sparsify(encoder("resnet18", **SMALL))
    wrapped = DistributedDataParallel(copy.deepcopy(alone))
    for grid in grids(2):
        x = pack(images(UNEQUAL, 32), grid)
        for model in (alone, wrapped):
            model.zero_grad()
            with bind(model, grid):
                loss_of(model(x)).backward()
        for ours, theirs in zip(wrapped.parameters(), alone.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_compiled_steps_with_fresh_grids_share_one_graph(name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = sparsify(encoder(name, **SMALL)).float()
    eager = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step, grid in enumerate(grids(3)):
        x = pack(images(UNEQUAL, 32, dtype=torch.float32), grid)
        for network in (compiled, eager):
            network.zero_grad()
            with bind(network, grid):
                loss_of(as_list(network(x))).backward()
        assert counters["stats"]["unique_graphs"] == 1, f"step {step}"
        assert not counters["graph_break"]
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_a_compiled_model_follows_between_packed_and_dense() -> None:
    torch._dynamo.reset()
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.MaxPool2d(3, 2, 1))
    model = sparsify(nn.Sequential(*layers).double())
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(UNEQUAL, 32)
    for grid in [*grids(1), PatchGrid.from_active(UNEQUAL)]:
        with bind(compiled, grid):
            assert same(compiled(pack(x, grid)), model(pack(x, grid)))
        assert same(compiled(x), model(x))
    torch._dynamo.reset()
