"""The host's part of eager calls on a fake GPU: a bound that no clock disturbs, and another checkout beside this."""

from pathlib import Path

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

import patchsparse
from benchmarks.gpu import host
from benchmarks.gpu.fake import fake_gpu
from patchsparse.backends.triton import launch

ROOT = Path(__file__).parents[2]
compiles = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET=1 runs kernels in Python")


@compiles
def test_three_passes_of_a_convolution_call_few_functions(monkeypatch, tmp_path_factory):
    """Of Python, whichever versions of it, PyTorch and Triton: it was 623 when each pass met a registered operator."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    launch._compiled.clear()
    with fake_gpu("h100") as seen:
        run = host.calls(patchsparse)["3x3 convolution, three passes"]
        run()  # builds the row tables of the grid
        seen.launches.clear()
        assert host.python_calls(run) <= 260
        convolutions = {"patch_conv2d_fwd_kernel": 2, "patch_conv2d_wgrad_kernel": 1}
        assert set(seen.launches) <= {*convolutions, "sum_splits_kernel"}
        assert {name: count // 4 for name, count in seen.launches.items() if name in convolutions} == convolutions
        monkeypatch.setattr(JITFunction, "run", None)  # all starts are remembered
        run()


def test_the_package_of_another_checkout_has_operators_of_its_own():
    other = host.load(ROOT)
    grid = other.PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    x, weight = torch.randn(8, 4, 2, 2), torch.randn(4, 4, 3, 3)
    ours = patchsparse.PatchGrid.from_active(grid.active)
    expected = patchsparse.patch_conv2d(x, weight, None, ours, padding=1)
    assert torch.equal(other.patch_conv2d(x, weight, None, grid, padding=1), expected)
    compiled = torch.compile(other.patch_conv2d, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, None, grid, padding=1), expected)
    assert hasattr(torch.ops.patchsparse_before, "conv2d")
    with pytest.raises(FileNotFoundError, match="give the root of a checkout"):
        host.load(ROOT / "docs")


@pytest.mark.rest
@compiles
def test_the_table_of_two_checkouts(capsys, monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 1)
    assert host.main(["--against", str(ROOT)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 8
    for row in rows:
        _, _, _, calls, _ = row.split("|")
        before, after = map(int, calls.split("->"))
        assert before == after > 0
