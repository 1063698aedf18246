"""The Triton engine without a GPU: interpreted against the other engines, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from itertools import cycle, product
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
    command += [
        f"tests/kernels/interpreted_{name}.py"
        for name in ("triton", "conv", "norms", "stem", "row_tables", "depthwise")
    ]
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

    offered = {a: list(compiled.launches(a)) for a in compiled.ARCHITECTURES}
    turns = cycle((90, 80, 100, 90, 86, 120, 90))
    names = dict.fromkeys(name for launches in offered.values() for name, _ in launches)
    cases, kinds = [], set()
    for name in names:
        having = [a for a in compiled.ARCHITECTURES if name in dict(offered[a])]
        kind = re.sub(r" ?(\d+x\d+x\d+|b?float\d+ C\d+|C\d+( tf32| ieee)?|\d (stages|taps))", "", name)
        for arch in having if "unpack" in name else [next(turn for turn in turns if turn in having)]:
            marks = pytest.mark.rest if kind in kinds or kind.startswith(("dgrad", "fwd tf32", "wgrad tf32")) else ()
            cases.append(pytest.param(dict(offered[arch])[name], arch, id=f"{name} sm_{arch}", marks=marks))
            kinds.add(kind)
    return cases


@pytest.mark.parametrize(("launch", "architecture"), _compilations())
def test_configurations_compile_without_spills(launch, architecture, monkeypatch):
    from . import compiled

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns unless one of the two is chosen
    usage = compiled.compile_launch(launch, architecture)
    assert usage.local == 0, f"{usage} spills {usage.local} bytes"
    assert usage.shared <= compiled.SHARED_LIMIT[architecture], usage
    constants = launch.constants
    wide = "BLOCK_K" in constants and constants["BLOCK_K"] >= 64 and constants.get("C_IN", 64) % 8 == 0
    if wide and constants["PRECISION"] == "ieee":
        assert usage.products > 0, "no tensor-core instruction"
        if not _in_one_step(constants):
            assert usage.pending >= launch.stages - 2, "the loads of the main loop are not pipelined"


def _in_one_step(constants):
    """Return whether a stem's whole sum is one step, so that there is no loop: 3x3 at stride 2 of 3 channels."""
    return "CELL" in constants and constants["V"][2] * constants["H"][2] * constants["CELL"] <= constants["BLOCK_K"]


@pytest.mark.skipif(INTERPRETED, reason="compiles for a GPU")
@pytest.mark.parametrize(("kind", "matrix", "copies", "programs"), [("fwd", 8, 16, 2), ("wgrad", 12, 16, 2)])
def test_the_main_loop_is_found_in_the_machine_code(kind, matrix, copies, programs):
    """128 x 128 x 64: 2 times 64 rows, 4 times 16 of the sum; three taps of 64 x 64 x 64. A copy moves 8 values."""
    from . import compiled

    three = next(t for t in configs.WGRAD if t.taps == 3)
    made = compiled.forward(configs.CONV[0], c=512, p=1) if kind == "fwd" else compiled.weight_gradient(three, c=64)
    usage = compiled.compile_launch(made, 90)
    loop = usage.loop
    assert loop is not None
    assert (loop.matrix, loop.copies, usage.programs) == (matrix, copies, programs)
    assert loop.matrix + loop.copies + loop.loads + loop.shared + loop.other == loop.total < 300


def test_every_shape_finds_a_shipped_configuration():
    def shape(tile):
        return tile.m, tile.n, tile.warps, tile.stages

    shipped = {configs.LARGE: (configs.CONV, configs.WGRAD), 99 << 10: (configs.CONV_SMALL, configs.WGRAD_SMALL)}
    shipped[163 << 10] = shipped[99 << 10]
    full = {shape(t) for t in configs.FULL}
    for shared, c_in, c_out in product(shipped, (1, 12, 64, 512), (1, 24, 64, 2048)):
        conv, wgrad = ({shape(t) for t in tiles} for tiles in shipped[shared])
        for (itemsize, tensor_cores), share in product(((2, True), (4, True), (4, False)), (0.3, 0.8, 1.0)):
            tiles = configs.conv_tiles(4096, c_in, c_out, itemsize, tensor_cores, share, shared)
            assert {shape(t) for t in tiles} <= (conv if tensor_cores else full)
            assert all(16 <= t.k <= 64 for t in tiles)
            assert tiles[0].sorted == (share < 0.75)
            assert all(configs.memory_of(t, itemsize, shared) <= shared for t in tiles)
            assert all(configs.programs_of(t, itemsize, shared) == 8 // t.warps for t in tiles)
            for taps in (9, 16, 49):
                tiles = configs.wgrad_tiles(c_in, c_out, taps, itemsize, tensor_cores, share, shared)
                assert {shape(t) for t in tiles} <= (wgrad if tensor_cores else full)
                assert all(taps % t.taps == 0 for t in tiles)
                assert all(configs.memory_of(t, itemsize, shared) <= shared for t in tiles)


@pytest.mark.parametrize("shared", [configs.LARGE, 99 << 10])
@pytest.mark.parametrize(("c_in", "c_out"), [(512, 512), (64, 64), (256, 1024), (64, 128)])
def test_few_rows_take_small_tiles(c_in, c_out, shared):
    """A tile of 256 x 128 for 1000 rows leaves most of a card idle: 0.065 in place of 0.022 ms on an H100."""
    work = []
    for rows in (1 << 20, 1 << 14, 1 << 10, 1 << 5):
        tile = configs.conv_tiles(rows, c_in, c_out, 2, True, 0.6, shared)[0]
        work.append(tile.m * tile.n)
        assert tile.m * tile.n == 64 * 64 or rows * c_out >= 128 * tile.m * tile.n
    assert work == sorted(work, reverse=True)


def test_what_a_compiler_spills_is_not_offered_on_that_card():
    for table, offered in (
        (configs.SPILLED, lambda itemsize, share, card: configs.conv_tiles(4096, 64, 64, itemsize, *share, *card)),
        (configs.WGRAD_SPILLED, lambda itemsize, share, card: configs.wgrad_tiles(64, 64, 9, itemsize, *share, *card)),
    ):
        for card, tiles in table.items():
            for itemsize, precise, share in product((2, 4), (True, False), (0.5, 0.8, 1.0)):
                found = offered(itemsize, (precise or itemsize == 2, share), (configs.LARGE, card))
                assert found
                assert not set(found) & set(tiles)


@pytest.mark.parametrize(
    ("tiles", "slots", "largest", "splits"),
    [
        (3, 264, 999, 88),  # one turn, exactly full
        (9, 264, 999, 29),  # 261 of 264 places: rounding up would leave a turn for 6 programs
        (36, 264, 7, 7),
        (144, 264, 1, 1),
        (300, 264, 999, 3),  # 900 programs in four turns fill 0.85 of the places, 300 in two 0.57
        (5, 4, 10, 3),  # more programs than places: 15 of 16 in four turns
    ],
)
def test_parts_of_the_weight_gradient_fill_whole_turns(tiles, slots, largest, splits):
    assert configs.splits_of(tiles, slots, largest) == splits


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
