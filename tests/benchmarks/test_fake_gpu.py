"""The fake GPU: what is compiled and counted, what is computed and what is only reserved."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.fake import fake_gpu
from patchsparse import PatchGrid, patch_batch_norm_act, patch_conv2d

ROOT = Path(__file__).parents[2]


@triton.jit
def doubling_kernel(x, y, count, BLOCK: tl.constexpr):
    """Write twice ``x`` into ``y``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < count), at < count)


def double(x: Tensor) -> Tensor:
    """Start the kernel on any tensor."""
    y = torch.empty_like(x)
    doubling_kernel[(triton.cdiv(x.numel(), 128),)](x, y, x.numel(), BLOCK=128)  # pyright: ignore[reportArgumentType]
    return y


PROGRAM = """
import torch
from tests.benchmarks.test_fake_gpu import double
print(torch.cuda.get_device_name(), sys.argv[1:])
double(torch.ones(1 << 20, device="cuda"))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test an empty cache of Triton's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_kernels_are_compiled_once_for_the_named_card_and_launches_are_counted(cache):
    for cached in (False, True):
        with fake_gpu("a100") as seen:
            double(torch.ones(64, device="cuda"))
            double(torch.ones(48, device="cuda"))
        assert dict(seen.launches) == {"doubling_kernel": 2}
        assert [(c.name, c.cached) for c in seen.compiled] == [("doubling_kernel", cached)]
        assert len(seen.missed) == (not cached)
    (ptx,) = cache.glob("*/doubling_kernel.ptx")
    assert ".target sm_80" in ptx.read_text()


def test_alignment_and_divisibility_are_those_of_the_real_run():
    with fake_gpu("h100", hollow=True) as seen:
        x = torch.empty(1 << 28, device="cuda")  # 1 GiB that nobody touches
        double(x)
        assert len(seen.compiled) == 1
        double(x[4:])  # 16 bytes on: aligned, and the count is divisible by 4 only
        assert len(seen.compiled) == 2
        double(x[1:-3])  # as long, but not aligned
        assert len(seen.compiled) == 3
        double(x[16:])
        assert len(seen.compiled) == 3


def test_tensors_say_that_they_are_on_the_card_and_compute_unless_hollow():
    with fake_gpu("h100"):
        x = torch.arange(6.0, device="cuda").requires_grad_()
        assert (x.device, x.is_cuda, torch.empty(3).is_cuda) == (torch.device("cuda", 0), True, True)
        (x * x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 2, 4, 6, 8, 10]
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.nn.functional.linear(x[None], x[None]).dtype == torch.bfloat16
    assert not torch.cuda.is_available()
    assert x.device.type == "cpu"


def test_hollow_programs_have_the_shapes_of_real_ones_and_their_small_values():
    scores = torch.rand(8, 9, 9)
    expected = PatchGrid.from_scores(scores, 32)
    with fake_gpu("h100", hollow=True):
        grid = PatchGrid.from_scores(scores.to("cuda"), 32)
        assert grid.device.type == "cuda"
        assert torch.equal(grid.slot.cpu(), expected.slot)
        assert PatchGrid.from_active(grid.active).num_active == 256  # a shape that follows from values
        net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.BatchNorm2d(64)).cuda()
        x = torch.randn(128, 64, 288, 288, device="cuda").contiguous(memory_format=torch.channels_last)  # 2.7 GB
        y = net(x)
        assert (y.shape, y.stride(), y.device.type) == (x.shape, x.stride(), "cuda")
        y.square().mean().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.is_cuda for p in net.parameters())


def test_hollow_programs_fail_where_devices_are_mixed():
    with fake_gpu("h100", hollow=True):
        host, card = torch.ones(3), torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
            host.add(card)
        assert (card * torch.tensor(2.0)).is_cuda  # a scalar of the host may mix
        assert torch.equal(host, card.cpu())
        assert not host.is_cuda


def test_what_would_follow_from_large_tensors_is_equal_true_and_not_nothing():
    with fake_gpu("h100", hollow=True):
        x = torch.randn(1 << 24, device="cuda")
        assert float((x.double() - x).norm() / x.norm().clamp_min(1e-30)) == 0
        assert bool(torch.isfinite(x).all())
        assert int((x > 0).sum()) == 1
        assert x[x > 0].shape == x.shape  # a mask of which nobody knows the values chooses all
        assert x.view(-1, 1 << 12)[torch.arange(1 << 12, device="cuda") < 9].shape == (9, 1 << 12)
        copied = copy.deepcopy(torch.nn.BatchNorm2d(8).cuda())
        assert all(tensor.is_cuda for tensor in copied.state_dict().values())


def test_a_loop_for_as_long_as_any_value_is_wrong_ends():
    with fake_gpu("h100", hollow=True):
        weight = torch.nn.init.trunc_normal_(torch.empty(512, 512, device="cuda"), std=0.02)
        assert not (weight > 1).any()
        assert (weight <= 1).all()


def test_copies_of_models_stay_on_the_card_and_large_masks_index():
    """As encoders are copied for each way, and as dense-and-mask takes what is visible."""
    with fake_gpu("h100", hollow=True):
        norm = torch.nn.BatchNorm2d(8).to("cuda")
        twin = copy.deepcopy(norm)
        assert all(t.is_cuda for t in (*twin.parameters(), *twin.buffers()))
        assert twin.running_mean is not None
        twin.running_mean += 1
        assert norm.running_mean is not None
        assert norm.running_mean.sum() == 0
        large = torch.randn(64, 96, 96, 4, device="cuda")
        visible = large[..., 0] > 0
        assert large[visible].shape[1:] == (4,)
        large[visible] = torch.zeros(4, device="cuda")


def test_graphs_and_events_go_through_their_motions():
    with fake_gpu("h100") as seen:
        x = torch.ones(8, device="cuda")
        captured, begun, ended = torch.cuda.CUDAGraph(), torch.cuda.Event(True), torch.cuda.Event(True)
        begun.record()
        with torch.cuda.graph(captured):
            assert torch.cuda.is_current_stream_capturing()
            double(x)
        captured.replay()
        ended.record()
        assert not torch.cuda.is_current_stream_capturing()
        assert begun.elapsed_time(ended) > 0
    assert seen.launches.total() == 1  # a replay starts nothing from Python


def test_kernels_may_be_counted_without_compiling_them():
    with fake_gpu("h100", hollow=True, compiles=False) as seen:
        double(torch.zeros(64, device="cuda").add(1).view(8, 8))
        double(torch.ones(64))
    assert seen.compiled == []
    assert dict(seen.launches) == {"doubling_kernel": 2}
    assert dict(seen.operators) == {"zeros": 1, "add": 1}  # views start nothing, and the other tensor is on the host


@pytest.mark.rest
def test_a_program_runs_on_the_fake_card_and_leaves_a_log_and_a_cache(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PROGRAM)
    command = [sys.executable, "-m", "benchmarks.gpu.fake", "--card", "a100", "--log", str(tmp_path / "log")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run([*command, str(program), "word"], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("NVIDIA A100-SXM4-80GB ['word']\nfake NVIDIA A100-SXM4-80GB: 1 kernels, 0 found")
    (log,) = (tmp_path / "log").glob("*.json")
    found = json.loads(log.read_text())
    assert found["launches"] == {"doubling_kernel": 1}
    assert len([*tmp_path.glob("*/doubling_kernel.cubin")]) == 1
    if triton.__version__ < "3.7":  # as the cache is brought to a machine with that version
        assert found["launchers"] == 2
        assert len([*tmp_path.glob("*/__triton_launcher*.so"), *tmp_path.glob("*/cuda_utils*.so")]) == 4


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'h1000' is unknown; choose one of a100, .*h100"), fake_gpu("h1000"):
        pass


def test_hollow_programs_start_the_kernels_that_small_ones_start():
    """The mode that makes tensors hollow must not be taken for one that records, as a compiler does."""
    started = []
    for hollow in (False, True):
        with fake_gpu("h100", hollow=hollow, compiles=False) as seen:
            grid = PatchGrid.random(2, (3, 3), 4, torch.Generator().manual_seed(0)).to("cuda")
            x = torch.randn(8, 32, 8, 8, device="cuda").requires_grad_()
            weight = torch.randn(32, 32, 3, 3, device="cuda").requires_grad_()
            mean, var, count = (
                torch.zeros(32, device="cuda"),
                torch.ones(32, device="cuda"),
                torch.zeros((), device="cuda"),
            )
            y = patch_conv2d(x, weight, None, grid, 1, 1)
            y = patch_batch_norm_act(y, None, None, mean, var, True, activation="relu", batches=count.long())
            torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        started.append(dict(seen.launches))
    assert started[0] == started[1]
    assert started[0]["norm_running_kernel"] == 1
