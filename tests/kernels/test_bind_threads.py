"""Each thread and each task runs a model on the grid that it has bound, also where backward recomputes."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from patchsparse import PatchGrid, bind, pack, sparsify
from patchsparse.adoption.binding import bindings_of
from patchsparse.testing import DenseAndMask

from .sparsify_cases import UNEQUAL, as_list, encoder, images, loss_of
from .test_bind_checkpoint import OTHER, SAME_COUNT, blocks, forward

THREADS, TURNS = 4, 12


def grids(count: int = THREADS) -> list[PatchGrid]:
    """Return grids of as many active patches each: taken for another, none would be noticed."""
    return [PatchGrid.random(2, (2, 3), 3, torch.Generator().manual_seed(seed)) for seed in range(count)]


def at_once(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Return the results of ``work(0), work(1), ...``, each in a thread of its own, all beginning together."""
    start = threading.Barrier(count)

    def begin(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def elsewhere(work: Callable[[], Any]) -> Any:
    """Return the result of ``work`` in a thread that has seen nothing before, and let it raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def small(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return sparsify(encoder("resnet18", out_indices=(0, 1)), **options).to(dtype)


def packed(model: nn.Module, grid: PatchGrid, x: Tensor) -> list[Tensor]:
    with bind(model, grid):
        return [feature.detach() for feature in as_list(model(pack(x, grid)))]


def same(ours: list[Tensor], theirs: list[Tensor], within: float = 0.0) -> bool:
    return all(torch.allclose(a, b, rtol=within, atol=within) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_threads_run_one_model_each_on_its_own_grid_and_one_densely(backend: str) -> None:
    model, x = small(backend=backend).eval(), images(UNEQUAL, 32, dtype=torch.float32)
    alone, dense = [packed(model, grid, x) for grid in grids()], [f.detach() for f in model(x)]

    def work(number: int) -> int:
        if number == THREADS:
            return sum(not same([f.detach() for f in model(x)], dense, 1e-5) for _ in range(TURNS))
        grid = grids()[number]  # with maps of its own: the engine builds its tables at once with others
        return sum(not same(packed(model, grid, x), alone[number], 1e-5) for _ in range(TURNS))

    assert at_once(work, THREADS + 1) == [0] * (THREADS + 1)
    assert bindings_of(model)[0].grid is None


def test_threads_share_a_grid_and_the_tables_that_are_built_for_it() -> None:
    model, x = small().eval(), images(UNEQUAL, 32, dtype=torch.float32)
    expected = packed(model, grids()[0], x)
    for seed in range(4):
        grid = grids()[0].to("cpu").permute(torch.arange(6))  # new maps
        found = at_once(lambda _, grid=grid: packed(model, grid, x))
        assert all(same(one, expected, 1e-5) for one in found), seed


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_threads_train_at_once(shared: bool) -> None:
    x = images(UNEQUAL, 32)
    models = [small(torch.float64)] * THREADS if shared else [small(torch.float64) for _ in range(THREADS)]

    def gradients(number: int) -> list[Tensor]:
        model, found = models[number], []
        for grid in [grids()[number]] * 3:
            with bind(model, grid):
                loss = loss_of(as_list(model(pack(x, grid))))
            found += torch.autograd.grad(loss, list(model.parameters()))
        return found

    expected = [gradients(number) for number in range(THREADS)]
    for ours, theirs in zip(at_once(gradients), expected, strict=True):
        assert same(ours, theirs, 1e-9)


def test_tasks_that_wait_within_their_blocks_do_not_meet() -> None:
    model, x = small().eval(), images(UNEQUAL, 32, dtype=torch.float32)
    alone = [packed(model, grid, x) for grid in grids()]

    async def work(number: int) -> bool:
        grid = grids()[number]
        right = True
        for _ in range(3):
            with bind(model, grid):
                await asyncio.sleep(0)
                right &= same(model(pack(x, grid)), alone[number], 1e-5)
                right &= same(await asyncio.to_thread(model, pack(x, grid)), alone[number], 1e-5)
        return right

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*map(work, range(THREADS)))

    assert asyncio.run(all_of_them()) == [True] * THREADS


def test_a_block_may_be_left_in_another_context() -> None:
    model, (outer, inner) = small(), grids(2)
    binding = bindings_of(model)[0]
    with bind(model, outer):
        block = bind(model, inner)
        block.__enter__()
        contextvars.copy_context().run(lambda: (block.__exit__(None, None, None), _expect(binding, outer)))
        _expect(binding, inner)


def _expect(binding: Any, grid: PatchGrid) -> None:
    assert binding.grid is grid


@pytest.mark.rest
def test_threads_share_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, x = small().eval(), images(UNEQUAL, 32, dtype=torch.float32)
    alone, dense = [packed(model, grid, x) for grid in grids()], [f.detach() for f in model(x)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for grid in grids(1):
            packed(compiled, grid, x)
        compiled(x)

    def work(number: int) -> int:
        with torch.no_grad():
            if number == THREADS:
                return sum(not same(compiled(x), dense, 1e-5) for _ in range(TURNS))
            return sum(not same(packed(compiled, grids()[number], x), alone[number], 1e-5) for _ in range(TURNS))

    assert [elsewhere(lambda n=n: work(n)) for n in range(THREADS + 1)] == [0] * (THREADS + 1)
    assert counter.frame_count == 2  # packed and dense, whatever the grid and the thread
    # Now and then Dynamo compiles once more for nothing, as its guards are not made for threads; results are right.
    assert at_once(work, THREADS + 1) == [0] * (THREADS + 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_a_thread_that_knows_nothing_calls_backward(mode: str) -> None:
    plain, saving = blocks("plain"), blocks(mode)
    expected = forward(plain, UNEQUAL) + 2 * forward(plain, SAME_COUNT)
    expected.backward()
    loss = forward(saving, UNEQUAL, checkpointing=True) + 2 * forward(saving, SAME_COUNT, checkpointing=True)
    with bind(saving, PatchGrid.from_active(OTHER)):
        elsewhere(loss.backward)
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    unknown = elsewhere(lambda: forward(saving, UNEQUAL))  # undeclared, and its thread has ended
    with pytest.raises(RuntimeError, match="checkpointing=True"):
        elsewhere(unknown.backward)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_threads_recompute_at_once(mode: str) -> None:
    model = blocks(mode)
    leaves = [images(active, 8).requires_grad_() for active in (UNEQUAL, SAME_COUNT, OTHER)]

    def work(number: int) -> list[Tensor]:
        found = []
        for _ in range(3):
            leaf = leaves[number].detach().requires_grad_()
            grid = PatchGrid.from_active((UNEQUAL, SAME_COUNT, OTHER)[number])
            with bind(model, grid, checkpointing=True):
                loss = loss_of([model(pack(leaf, grid))])
            loss.backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
        return found

    expected = [work(number) for number in range(3)]
    assert all(same(ours, theirs, 1e-10) for ours, theirs in zip(at_once(work, 3), expected, strict=True))


def test_a_dense_model_is_checkpointed_while_a_thread_that_ended_has_left_a_grid() -> None:
    plain, saving = blocks("plain"), blocks("reentrant")
    elsewhere(lambda: forward(saving, UNEQUAL))
    for model in (plain, saving):
        loss_of([model(images(UNEQUAL, 8).requires_grad_())]).backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_block_within_backward_has_its_own_grid() -> None:
    """A hook that runs the model itself, in the middle of a pass that recomputes."""
    model, other = blocks("reentrant"), PatchGrid.from_active(OTHER)
    x = pack(images(OTHER, 8), other).requires_grad_()
    with bind(model, other, checkpointing=True):
        expected = model(x)
    found = []

    def look(gradient: Tensor) -> None:
        with torch.enable_grad(), bind(model, other, checkpointing=True):
            found.append(model(x))

    loss = forward(model, UNEQUAL, checkpointing=True)
    next(model.parameters()).register_hook(look)
    loss.backward()
    assert same(found, [expected])


def test_threads_run_dense_and_mask_each_on_its_own_grid() -> None:
    reference, x = (
        DenseAndMask(encoder("resnet18", out_indices=(0, 1)).float().eval(), grids()[0]),
        images(UNEQUAL, 32, dtype=torch.float32),
    )
    alone = [[f.detach() for f in reference(x, grid)] for grid in grids()]
    assert same(alone[0], reference(x), 1e-6)

    def work(number: int) -> int:
        grid = grids()[number]
        return sum(not same([f.detach() for f in reference(x, grid)], alone[number], 1e-5) for _ in range(TURNS))

    assert at_once(work) == [0] * THREADS
    again = copy.deepcopy(reference)
    assert same([f.detach() for f in again(x, grids()[1])], alone[1], 1e-5)


@pytest.mark.rest
def test_recomputation_in_autograds_own_thread() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.autograd_threads"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "recomputed in autograd's thread\n"
