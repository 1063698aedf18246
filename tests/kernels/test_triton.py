"""The Triton engine without a GPU: interpreted against the other engines, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch

from patchsparse import PatchGrid, patch_conv2d
from patchsparse.backends import why_not
from patchsparse.geometry import Call, Stencil

configs = pytest.importorskip("patchsparse.backends.triton.configs", reason="Triton is not installed")

SAME = Stencil((3, 3), padding=(1, 1))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("part", ["not rest", pytest.param("rest", marks=pytest.mark.rest)])
def test_interpreted_kernels_equal_the_other_engines(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--strict-markers", "-m", part]
    command += [f"tests/kernels/interpreted_{name}.py" for name in ("triton", "norms", "stem")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def _compilations() -> list:
    """Return every configuration of the kernels, each with one architecture in turn; ``compiled.py`` runs them all.

    By default one configuration of each kernel is compiled.
    """
    if INTERPRETED:
        return []
    from . import compiled

    chosen = [(n, launch) for n, launch in compiled.launches() if not n.startswith(("dgrad", "fwd tf32", "wgrad tf32"))]
    cases, kinds = [], set()
    for (name, launch), turn in zip(chosen, cycle((90, 80, 100, 90)), strict=False):
        kind = re.sub(r" ?(\d+x\d+x\d+|b?float\d+ C\d+|C\d+( tf32| ieee)?)", "", name)
        for arch in compiled.supported(launch, compiled.ARCHITECTURES if "unpack" in name else (turn,)) or (90,):
            marks = pytest.mark.rest if kind in kinds else ()
            cases.append(pytest.param(launch, arch, id=f"{name} sm_{arch}", marks=marks))
            kinds.add(kind)
    return cases


@pytest.mark.parametrize(("launch", "architecture"), _compilations())
def test_configurations_compile_without_spills(launch, architecture, monkeypatch):
    from . import compiled

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns unless one of the two is chosen
    usage = compiled.compile_launch(launch, architecture)
    assert usage.local == 0, f"{usage} spills"
    assert usage.shared <= compiled.SHARED_LIMIT[architecture], usage
    if "BLOCK_K" in launch.constants and launch.constants["PRECISION"] == "ieee" and launch.constants["BLOCK_K"] >= 64:
        assert usage.products > 0, "no tensor-core instruction"
        assert usage.pending >= 1 or launch.stages < 3, "the loads of the main loop are not pipelined"


def test_every_shape_finds_a_shipped_configuration():
    def shape(tile):
        return tile.m, tile.n, tile.warps, tile.stages

    conv, wgrad, full = ({shape(t) for t in tiles} for tiles in (configs.CONV, configs.WGRAD, configs.FULL))
    for c_in in (1, 12, 64, 512):
        for c_out in (1, 24, 64, 2048):
            for itemsize, tensor_cores in ((2, True), (4, True), (4, False)):
                for share in (0.3, 0.8, 1.0):
                    options = (itemsize, tensor_cores, share)
                    tiles = configs.conv_tiles(4096, c_in, c_out, *options, True)
                    assert {shape(t) for t in tiles} <= (conv if tensor_cores else full)
                    assert all(16 <= t.k <= 128 for t in tiles)
                    assert tiles[0].sorted == (share < 0.75)
                    small = configs.conv_tiles(4096, c_in, c_out, *options, True, False)
                    assert not any(configs.is_large(t) for t in small)
                    tiles = configs.wgrad_tiles(c_in, c_out, *options)
                    assert {shape(t) for t in tiles} <= (wgrad if tensor_cores else full)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_cpu_tensors_are_refused_with_the_reason():
    grid = PatchGrid.random(1, (2, 2), 3)
    with pytest.raises(RuntimeError, match="needs a CUDA device; tensors are on cpu"):
        patch_conv2d(torch.zeros(3, 4, 2, 2), torch.zeros(4, 4, 3, 3), None, grid, 1, 1, backend="triton")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64 is not supported"),
        ({"stencil": Stencil((9, 9), padding=(4, 4))}, "81 taps is too large; at most 62"),
        ({"num_active": 2**31}, "more than 2\\^31 rows"),
    ],
)
def test_what_the_engine_cannot_do_is_said(changes, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    fields = {"dtype": torch.float32, "num_active": 8, "size": (1, 1), "stencil": SAME} | changes
    call = Call("conv2d", "cuda", in_channels=4, out_channels=4, **fields)
    found = why_not("triton", call)
    assert found is not None
    assert re.search(reason, found)


def test_old_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    call = Call("conv2d", "cuda", torch.float32, 8, (1, 1), 4, 4, SAME)
    assert why_not("triton", call) == "needs compute capability 8.0; this device has 7.5"
