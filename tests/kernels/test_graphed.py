"""graphed: PyTorch's own capture on a fake GPU whose graphs compute, plain calls elsewhere, and a real GPU if any.

What is compared is always ``with bind(model, grid): model(pack(images, grid))`` of a copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from triton import knobs

from benchmarks.gpu.fake import fake_gpu
from patchsparse import PatchGrid, bind, graphed, join_statistics, pack, sparsify
from patchsparse.adoption.graphed import Run, computation

from .dispatched import Dispatched
from .recorded_cuda import recorded_gpu
from .sparsify_cases import as_list, encoder, loss_of

SHAPE, PATCH = (2, 3), 32
compiles = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET=1 runs kernels in Python")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def gpu() -> Iterator[None]:
    with recorded_gpu():
        yield


def small(name: str = "resnet18", backend: str = "gather", **options: Any) -> nn.Module:
    return sparsify(encoder(name, **{"out_indices": (0, 1), **options}), backend=backend)


def grids(count: int, keep: int = 3) -> list[PatchGrid]:
    return [PatchGrid.random(2, SHAPE, keep, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def frames(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, SHAPE[0] * PATCH, SHAPE[1] * PATCH, generator=generator, dtype=dtype)


def plain(model: nn.Module, images: Tensor, grid: PatchGrid) -> list[Tensor]:
    with bind(model, grid):
        return as_list(model(pack(images, grid)))


def state(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in (model.state_dict() | gradients).items()}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative difference."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not error(ours[name], theirs[name]) <= within]
    assert not different, different


def assert_steps_alike(run: Run, other: nn.Module, seen: list[PatchGrid], within: float = 0.0) -> None:
    """Compare features, buffers and gradients of steps on several grids, whose gradients accumulate."""
    for seed, grid in enumerate(seen):
        images = frames(seed)
        torch.manual_seed(seed)
        features = as_list(run(images, grid))
        torch.manual_seed(seed)
        expected = plain(other, images, grid)
        assert all(error(ours, theirs) <= within for ours, theirs in zip(features, expected, strict=True))
        loss_of(features).backward()
        loss_of(expected).backward()
        assert_same(state(run.model), state(other), within)


def test_without_a_gpu_it_binds_and_runs_and_says_why() -> None:
    model = small("regnety_002")
    other = copy.deepcopy(model)
    run = graphed(model, frames(), grids(1)[0])
    assert not run.captured
    assert "images are on cpu" in run.reason
    assert_steps_alike(run, other, grids(2))
    with pytest.raises(ValueError, match="call sparsify"):
        graphed(nn.Conv2d(3, 3, 3), frames(), grids(1)[0])


@pytest.mark.parametrize("name", ["resnet18", pytest.param("convnext_atto", marks=pytest.mark.rest)])
def test_what_is_captured_is_a_function_of_its_tensors(name: str) -> None:
    """Two masks in the same memory one after the other: nothing is remembered of the first."""
    model = small(name)
    other = copy.deepcopy(model)
    compute = computation(model)
    one, two = grids(2)
    places = [frames(0), one.active.clone(), one.coords.clone(), one.slot.clone()]
    parameters = [p.detach().requires_grad_() for p in model.parameters()]
    for seed, grid in enumerate((one, two)):
        for place, tensor in zip(places, (frames(seed), grid.active, grid.coords, grid.slot), strict=True):
            place.data.copy_(tensor)  # its version stays, as when a graph writes
        features, expected = compute(*places, *parameters), plain(other, frames(seed), grid)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, expected, strict=True))
        ours = torch.autograd.grad(loss_of(features), parameters)
        theirs = torch.autograd.grad(loss_of(expected), [*other.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("gpu")
def test_features_that_were_changed_in_place_and_calls_from_other_threads_are_refused() -> None:
    model, grid = small(), grids(1)[0]
    run = graphed(model, frames(), grid)
    features = as_list(run(frames(), grid))
    features[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss_of(features).backward()
    assert all(p.grad is None for p in model.parameters())
    loss_of([feature.clone().mul_(2) for feature in as_list(run(frames(), grid))]).backward()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="in each thread"):
        pool.submit(run, frames(), grid).result()


# An operator that is recorded may sum in another order than one that autograd calls.
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "within"), [("resnet18", 0.0), pytest.param("convnext_atto", 1e-14, marks=pytest.mark.rest)]
)
def test_replays_are_the_steps_of_other_masks_and_a_capture_moves_nothing(name: str, within: float) -> None:
    model = small(name, drop_path_rate=0.5)
    before, parameters, dice = state(model), [*model.parameters()], torch.get_rng_state()
    other, images = copy.deepcopy(model), frames(9)
    captured_on, *seen = grids(4)
    run = graphed(model, images, captured_on)
    assert run.captured
    assert run.reason == ""
    assert_same(state(model), before)
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    forward = model.forward
    model.forward = None  # type: ignore[method-assign, assignment]
    assert_steps_alike(run, other, seen, within)  # no Python of the model runs
    for each in (model, other):
        for parameter in each.parameters():
            parameter.grad = parameter.grad.zero_() if parameter.grad is not None else None  # keep their place
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.mul_(1.25)
            theirs.mul_(1.25)
    assert_steps_alike(run, other, seen, within)
    model.forward = forward  # type: ignore[method-assign]
    model.eval()
    other.eval()
    assert_steps_alike(run, other, grids(1, keep=2), within)  # another mode: called as usual, whatever the shapes
    assert torch.equal(images, frames(9))  # what was captured on is not where replays read
    assert torch.equal(captured_on.slot, grids(1)[0].slot)


@pytest.mark.usefixtures("gpu")
def test_images_that_need_gradients_get_them_and_frozen_parameters_none() -> None:
    model = small()
    model.get_submodule("conv1").requires_grad_(False)
    other = copy.deepcopy(model)
    one, two = grids(2)
    run = graphed(model, frames().requires_grad_(), one)
    for grid in (two, one):
        ours, theirs = (frames(3).requires_grad_() for _ in range(2))
        loss_of(as_list(run(ours, grid))).backward()
        loss_of(plain(other, theirs, grid)).backward()
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
        assert_same(state(model), state(other))


@pytest.mark.usefixtures("gpu")
def test_it_computes_as_autocast_said_at_the_capture() -> None:
    model = small().float()
    other = copy.deepcopy(model)
    one, two = grids(2)
    with torch.autocast("cuda", torch.bfloat16):
        run = graphed(model, frames(dtype=torch.float32), one)
        features = as_list(run(frames(1, torch.float32), two))
        expected = plain(other, frames(1, torch.float32), two)
    assert [f.dtype for f in features] == [f.dtype for f in expected]
    assert torch.bfloat16 in {f.dtype for f in features}
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    loss_of([f.float() for f in features]).backward()
    loss_of([f.float() for f in expected]).backward()
    assert_same(state(model), state(other))
    with pytest.raises(ValueError, match=r"autocast is off, .*captured with on \(torch.bfloat16\); call graphed"):
        run(frames(dtype=torch.float32), one)


@pytest.mark.usefixtures("gpu")
def test_what_a_replay_cannot_do_is_refused() -> None:
    model, (grid, other) = small(), grids(2)
    run = graphed(model, frames(), grid)
    for images, wrong, message in (
        (frames(), grids(1, 4)[0], "number of active patches of grid is 8, and the graph was captured for 6"),
        (frames()[..., :64], grid, r"images is \(2, 3, 64, 64\), and .* for \(2, 3, 64, 96\); call graphed"),
        (frames().float(), grid, "dtype of images is torch.float32"),
        (frames(), PatchGrid.from_active(grid.active.view(2, 3, 2)), r"grid \(B, Gh, Gw\) is \(2, 3, 2\)"),
        (frames().requires_grad_(), grid, "images require a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            run(images, wrong)
    first, second = run(frames(), grid), run(frames(), other)
    with pytest.raises(RuntimeError, match="after a later call"):
        loss_of(first).backward()
    loss = loss_of(second)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="came twice"):
        loss.backward()
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="frozen or freed"):
        run(frames(), grid)


@pytest.mark.usefixtures("gpu")
def test_models_that_no_graph_can_hold_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grids(1)[0]
    model = small()
    handle = model.get_submodule("layer1.0.bn1").register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"layer1.0.bn1 \(.*\) has hooks"):
        graphed(model, frames(), grid)
    handle.remove()
    join_statistics(model, lambda x: x[None])  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="join_statistics"):
        graphed(model, frames(), grid)
    join_statistics(model, None)
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = model
    with pytest.raises(ValueError, match="give graphed its module"):
        graphed(parallel, frames(), grid)
    before = state(model)

    def broken(function: Any, sample: Any, **options: Any) -> None:
        function(*sample)
        raise ZeroDivisionError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    with pytest.raises(RuntimeError, match=r"could not be captured: ZeroDivisionError: operation .*capturing\. Call"):
        graphed(model, frames(), grid)
    assert_same(state(model), before)


@compiles
def test_tables_of_the_grid_are_built_in_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the model's Python, warming up or captured, starts all kernels of a new grid; replays start none."""
    model = small(backend="auto").float()
    with fake_gpu("h100", compiles=False) as seen:
        one, two = grids(2)
        loss_of(plain(model, frames(dtype=torch.float32), one)).backward()
        once = dict(seen.launches)
        assert any("row_table" in name for name in once)
        seen.launches.clear()
        run = graphed(model, frames(dtype=torch.float32), one)
        assert dict(seen.launches) == {name: 4 * count for name, count in once.items()}
        seen.launches.clear()
        model.zero_grad()
        features = run(frames(dtype=torch.float32), two)
        directions = [torch.ones_like(feature) for feature in features]
        with Dispatched() as started:  # gradients come in the layout of their weights, or each would be copied again
            torch.autograd.backward(features, directions)
        assert not seen.launches
        assert set(started.names) == {"copy_", "detach", "_foreach_mul"}
        assert started.names.count("copy_") == len(features)
        assert started.names.count("_foreach_mul") == 1


@needs_gpu
@pytest.mark.filterwarnings("default")  # those of a card's libraries are not what is tested
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_on_a_gpu_replays_are_the_steps_of_other_masks(name: str, half: bool) -> None:
    model = small(name, "auto").float().cuda()
    other = copy.deepcopy(model)
    captured_on, *seen = (grid.to("cuda") for grid in grids(4))
    before = state(model)
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        run = graphed(model, frames(9, torch.float32).cuda(), captured_on)
    assert run.captured
    assert_same(state(model), before)
    for seed, grid in enumerate(seen):
        images = frames(seed, torch.float32).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            features, expected = as_list(run(images, grid)), plain(other, images, grid)
        generator = torch.Generator("cuda").manual_seed(seed)
        directions = [torch.randn(f.shape, generator=generator, device="cuda", dtype=f.dtype) for f in expected]
        torch.autograd.backward(features, directions)
        torch.autograd.backward(expected, directions)
        for ours, theirs in zip(features, expected, strict=True):
            assert error(ours, theirs) < (2e-2 if half else 1e-4)
    assert_same(dict(model.named_buffers()), dict(other.named_buffers()), 1e-3)
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, other)]
    assert error(*gradients) < (2e-2 if half else 1e-3)
