"""Starts of Triton kernels: a remembered one hands the driver what Triton's own would, for kernels of every kind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from benchmarks.gpu.fake import fake_gpu
from patchsparse.backends.triton import launch
from patchsparse.backends.triton.launch import Launch, Start


@triton.jit
def scaled_kernel(p_x, p_bias, p_y, count, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``y = scale * x + bias``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + at, mask=at < count, other=0.0) * scale
    if p_bias is not None:
        x += tl.load(p_bias + at, mask=at < count, other=0.0)
    tl.store(p_y + at, x, mask=at < count)


def scaled(x: Tensor, count: int, scale: float = 2.0, bias: Tensor | None = None, grid: tuple[int, ...] = (1,), **more):
    """Return the launch of the kernel, with constants in another order than the kernel's."""
    arguments = (x, bias, torch.empty_like(x), count, scale)
    return Launch(scaled_kernel, grid, arguments, {"BLOCK": 64, "FLAG": False} | more, 4, 1)


@pytest.fixture(autouse=True)
def started(tmp_path_factory, monkeypatch) -> Iterator[list[tuple[Any, ...]]]:
    """Return what the driver is given for each start: the compiled kernel, then all arguments."""
    if not isinstance(scaled_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET=1 runs kernels in Python")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    given: list[tuple[Any, ...]] = []
    with fake_gpu("h100"):
        monkeypatch.setattr(driver.active, "launcher_cls", lambda src, metadata: lambda *args: given.append(args))
        monkeypatch.setattr(driver.active, "get_current_stream", lambda device=None: 7)
        yield given


def various() -> list[Launch]:
    """Return launches of many kinds, some of which have the same compiled kernel."""
    x, half = torch.ones(256), torch.ones(256, dtype=torch.bfloat16)
    launches = [scaled(x, count) for count in (1, 2, 3, 16, 32, 2**31, 2**31 + 16)]
    launches += [scaled(x[at:], 5) for at in (1, 2, 4, 8)]  # 4 and 8 are aligned to 16 bytes
    launches += [scaled(half, 5), scaled(x, 5, bias=half), scaled(x, 5, 1.0), scaled(x, 5, 1), scaled(x, True)]
    launches += [
        scaled(x, 5, grid=(3, 2)),
        scaled(x, 5, grid=(4, 3, 2)),
        scaled(x, 5, FLAG=True),
        scaled(x, 5, BLOCK=32),
    ]
    return launches


def described(given: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return what can be compared: addresses instead of tensors, and no metadata of the hooks."""

    def plain(value: Any) -> Any:
        return value.data_ptr() if isinstance(value, Tensor) else value

    return [tuple(map(plain, (*args[:6], *args[9:]))) for args in given]


def test_a_remembered_start_is_triton_s_own(started, monkeypatch):
    launches = various()
    runs = {}
    for name, direct in (("public", False), ("first", True), ("again", True)):
        monkeypatch.setattr(launch, "_DIRECT", direct)
        started.clear()
        before = len(launch._compiled)
        for each in launches:
            each.run()
        assert (len(launch._compiled) > before) is (name == "first")
        runs[name] = described(started)
    assert len(runs["public"]) == len(launches)
    assert runs["public"] == runs["first"] == runs["again"]
    assert {call[3] for call in runs["again"]} == {7}, "the current stream"
    device = driver.active.get_current_device()  # pyright: ignore[reportAttributeAccessIssue]
    assert len({id(each) for each in scaled_kernel.device_caches[device][0].values()}) > 8


def test_a_second_start_does_not_ask_triton(started, monkeypatch):
    first = scaled(torch.ones(64), 5)
    first.run()
    monkeypatch.setattr(scaled_kernel, "run", None)
    first.run()
    scaled(torch.ones(64), 5, 3.0).run()  # floats are not compiled for
    assert len(started) == 3
    for other in (scaled(torch.ones(64), 6), scaled(torch.ones(65)[1:], 5)):
        with pytest.raises(TypeError, match="not callable"):
            other.run()


def test_another_device_has_kernels_of_its_own(started):
    each = scaled(torch.ones(64), 5)
    each.run()
    with fake_gpu("h100") as other:
        each.run()
        each.run()
    assert dict(other.launches) == {"scaled_kernel": 2}
    assert len(started) == 1


def test_a_start_of_tensors_elsewhere_makes_their_device_the_current_one(started, monkeypatch):
    """A program may use a second card without making it the current one."""
    x, y = torch.ones(64, device="cuda"), torch.empty(64, device="cuda")
    start = Start(scaled_kernel, (1,), (64, 2.0), {"FLAG": False, "BLOCK": 64}, 4, 1)
    entered: list[torch.device] = []
    inside: Any = torch.cuda.device

    def entering(device):
        entered.append(device)
        return inside(device)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(driver.active, "get_current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", entering)
    for _ in range(3):
        start(x, None, y)
    assert entered == [x.device] * 3
    assert len(started) == 3


def test_hooks_of_profilers_are_called(started, monkeypatch):
    seen = []
    each = scaled(torch.ones(64), 5)
    each.run()
    hook = knobs.HookChain()
    hook.add(seen.append)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    each.run()
    metadata, enter = started[-1][6:8]
    assert metadata.get()["name"] == "scaled_kernel"
    assert enter is hook


def test_the_memory_of_starts_is_bounded(started, monkeypatch):
    monkeypatch.setattr(launch, "MOST_STARTS", 4)
    for count in (*range(20, 30), *range(20, 30)):
        scaled(torch.ones(64), count).run()
        assert len(launch._compiled) <= 4
    assert [args[12] for args in started] == [*range(20, 30)] * 2


def test_versions_of_triton_that_are_not_known_take_the_public_way(started, monkeypatch):
    monkeypatch.setattr(launch, "_DIRECT", False)
    launch._compiled.clear()
    for _ in range(2):
        scaled(torch.ones(64), 5).run()
    assert not launch._compiled
    assert len(started) == 2
