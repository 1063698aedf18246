"""What calls remember of calls before: a call of other properties is never served what was worked out for another."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton import compiler, knobs

from benchmarks.gpu.fake import _Uncompiled, fake_gpu
from patchsparse import PatchGrid, patch_batch_norm_act, patch_batch_norm_unpack, patch_conv2d
from patchsparse.backends.triton import launch, tuning
from patchsparse.backends.triton.configs import CONV
from patchsparse.backends.triton.tuned import Kind
from patchsparse.eager import forget

GENERATOR = torch.Generator().manual_seed(0)
SPARSE, DENSER = (PatchGrid.random(2, (4, 4), keep, generator=GENERATOR) for keep in (6, 15))


@pytest.fixture(autouse=True)
def started() -> Iterator[list[tuple[Any, ...]]]:
    """Return what is started: for what it would be compiled, how many programs, numbers, and which pointers fit."""
    if knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 runs kernels in Python")
    given: list[tuple[Any, ...]] = []

    def described(value: Any) -> Any:
        address = value.data_ptr() if isinstance(value, Tensor) else value
        return f"address {address % 16}" if isinstance(address, int) and address > 2**33 else address

    class Counted(_Uncompiled):
        def __init__(self, src: Any, *args: Any, **kwargs: Any):
            super().__init__(src, Counter())
            made = (src.fn.__name__, str(src.signature), str(src.attrs), str(src.constants), str(kwargs.get("options")))
            self._run = lambda *a: given.append((made, a[:3], *map(described, a[9:])))

    with fake_gpu("h100", compiles=False), mock.patch.object(compiler, "compile", Counted):
        yield given
    forget()


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def convolutions() -> dict[str, Callable[[], Any]]:
    """Return convolutions with their gradients that differ in one property each."""

    def conv(grid=SPARSE, c=32, out=32, p=2, k=3, dtype=torch.bfloat16, bias=False, weight=None, x=None, **options):
        x = leaf(grid.num_active, c, p, p, dtype=dtype) if x is None else x
        weight = leaf(out, c // options.get("groups", 1), k, k, dtype=dtype) if weight is None else weight
        shift = torch.ones(out, dtype=dtype) if bias else None
        return lambda: patch_conv2d(x, weight, shift, grid, padding=k // 2, **options).sum().backward()

    shifted = torch.ones(SPARSE.num_active * 128 + 1, dtype=torch.bfloat16)[1:]  # two bytes beside a whole line
    return {
        "plain": conv(),
        "float16": conv(dtype=torch.float16),
        "float32": conv(dtype=torch.float32),
        "more patches": conv(DENSER),
        "other patches": conv(p=4),
        "more channels": conv(c=64),
        "more outputs": conv(out=64),
        "stride": conv(p=4, stride=2),
        "kernel": conv(k=5),
        "groups": conv(c=64, out=64, groups=2),
        "bias": conv(bias=True),
        "plain layout": conv(weight=torch.ones(32, 32, 3, 3, dtype=torch.bfloat16).requires_grad_()),
        "no alignment": conv(x=shifted.view(-1, 2, 2, 32).permute(0, 3, 1, 2).requires_grad_()),
    }


def norms() -> dict[str, Callable[[], Any]]:
    """Return norms with their gradients that differ in one property each."""

    def norm(c=32, p=2, dtype=torch.bfloat16, weight=True, residual=None, running=None, image=False, **options):
        x, vector = leaf(SPARSE.num_active, c, p, p, dtype=dtype), torch.ones(c).requires_grad_() if weight else None
        mean, var = running or (torch.zeros(c), torch.ones(c))
        other = None if residual is None else leaf(SPARSE.num_active, c, p, p, dtype=residual)
        more: dict[str, Any] = {"training": True} | options
        if image:
            return lambda: patch_batch_norm_unpack(x, SPARSE, vector, vector, mean, var, **more).sum().backward()
        return lambda: patch_batch_norm_act(x, vector, vector, mean, var, residual=other, **more).sum().backward()

    halves = (torch.zeros(32).bfloat16(), torch.ones(32).bfloat16())
    return {
        "plain": norm(),
        "float16": norm(dtype=torch.float16),
        "float32": norm(dtype=torch.float32),
        "channels": norm(c=48),
        "pixels": norm(p=4),
        "no weight": norm(weight=False),
        "residual": norm(residual=torch.bfloat16),
        "wide residual": norm(residual=torch.float32),
        "activation": norm(activation="silu"),
        "slope": norm(activation="leaky_relu", slope=0.2),
        "another slope": norm(activation="leaky_relu", slope=0.3),
        "eps": norm(eps=1e-3),
        "momentum": norm(momentum=0.3),
        "running type": norm(running=halves),
        "batches": norm(batches=torch.tensor(0)),
        "given": norm(training=False),
        "given half": norm(training=False, running=halves),
        "no alignment": norm(running=(torch.zeros(33)[1:], torch.ones(33)[1:])),
        "image": norm(image=True),
        "image, token": norm(image=True, fill=torch.ones(32)),
        "image, eps": norm(image=True, eps=1e-3),
        "image, given": norm(image=True, training=False),
    }


@pytest.mark.parametrize("calls", [convolutions, norms])
def test_calls_in_any_order_start_what_they_start_alone(started, calls):
    alone, runs = {}, calls()
    for name, run in runs.items():
        forget()
        launch._compiled.clear()
        run()  # builds the tables of its grid
        started.clear()
        forget()
        launch._compiled.clear()
        run()
        alone[name] = [*started]
    assert len({str(found) for found in alone.values()}) >= len(alone) - 1  # a plain layout is copied into the other
    forget()
    for order in (list(runs), list(reversed(runs)), list(runs)):
        for name in order:
            started.clear()
            runs[name]()
            assert started == alone[name], name


def test_settings_that_change_between_calls_are_met(started, monkeypatch):
    run = convolutions()["float32"]

    def precisions() -> list[str]:
        started.clear()
        run()
        return [found[0][3] for found in started if "fwd" in found[0][0] or "wgrad" in found[0][0]]

    for allowed in (True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        found = precisions()
        assert len(found) == 3
        assert all("tf32" in constants for constants in found) is allowed


def test_a_configuration_that_is_tuned_later_is_taken(started, monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})
    run, other = convolutions()["plain"], CONV[3]
    run()
    (kind,) = (kind for kind in tuning._chosen if isinstance(kind, Kind) and kind.operation == "conv2d")
    for chosen in (None, other, None, other):
        tuning._chosen[kind] = chosen
        started.clear()
        run()
        blocks = next(found[-3:] for found in started if found[0][0] == "patch_conv2d_fwd_kernel")
        assert (blocks == (other.m, other.n, other.k)) is (chosen is other), blocks
