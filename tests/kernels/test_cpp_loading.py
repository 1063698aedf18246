"""Finding the C++ engine: instruction sets by name, threads borrowed from torch, and life without it."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchsparse import PatchGrid, available_backends, explain, patch_conv2d
from patchsparse.backends import cpp
from patchsparse.backends.cpp import library, native
from patchsparse.backends.cpp.choice import DTYPES
from patchsparse.geometry import Call, Stencil

built = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))
CALL = Call("conv2d", "cpu", torch.float32, 8, (4, 4), 16, 16, Stencil((3, 3), (1, 1), (1, 1)))


@pytest.fixture
def missing(monkeypatch):
    """Make the engine look as if it had not been built."""
    absent = library.Library(None, f"the C++ engine was not built; {library.HOW}")
    monkeypatch.setattr(library, "load", lambda: absent)


@pytest.fixture
def problem():
    grid = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
    return grid, torch.randn(8, 16, 4, 4), torch.randn(16, 16, 3, 3)


def test_without_the_library_another_engine_serves_and_explain_says_how_to_get_it(missing, problem):
    grid, packed, weight = problem
    assert patch_conv2d(packed, weight, None, grid, padding=1).shape == packed.shape
    text = explain(patch_conv2d, packed, weight, None, grid, padding=1)
    assert "gather: taken" in text
    assert "cpp: cannot run, the C++ engine was not built" in text
    assert "compiler" in text
    assert "cpp" not in available_backends()
    with pytest.raises(RuntimeError, match="not built"):
        patch_conv2d(packed, weight, None, grid, padding=1, backend="cpp")


@built
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "runs on the CPU"),
        ({"dtype": torch.float16}, "not torch.float16"),
        ({"groups": 4}, "groups=1 or depthwise"),
        ({"num_active": 2**28}, "at most"),
    ],
)
def test_why_not_names_the_reason(change, reason):
    assert cpp.why_not(CALL) is None
    assert reason in str(cpp.why_not(CALL._replace(**change)))


@built
def test_an_unknown_instruction_set_is_refused(problem, monkeypatch):
    grid, packed, weight = problem
    monkeypatch.setenv(library.ISA, "avx9000")
    with pytest.raises(RuntimeError, match=r"PATCHSPARSE_ISA=avx9000 cannot run here; choose one of portable"):
        patch_conv2d(packed, weight, None, grid, padding=1, backend="cpp")


def test_a_missing_library_has_no_instruction_set_and_says_how_to_get_it():
    absent = library.Library(None, f"the C++ engine was not built; {library.HOW}")
    with pytest.raises(RuntimeError, match="not built; reinstall with a C"):
        absent.isa()


@built
@pytest.mark.parametrize("isa", library.load().isas)
def test_each_instruction_set_is_chosen_by_its_name(isa, monkeypatch):
    monkeypatch.setenv(library.ISA, isa)
    assert library.load().isa() == isa
    assert native.ISAS[library.load().isa_number()] == isa
    monkeypatch.delenv(library.ISA)
    assert library.load().isa() == library.load().isas[-1]


HEADER = re.sub(r"//[^\n]*", "", (Path(__file__).parents[2] / "csrc" / "engine.h").read_text())


@pytest.mark.parametrize(
    ("mirror", "name"),
    [
        (native.Geometry, "ps_geometry"),
        (native.Conv, "ps_conv_args"),
        (native.Wgrad, "ps_wgrad_args"),
        (native.Depthwise, "ps_depthwise_args"),
        (native.Pool, "ps_pool_args"),
    ],
)
def test_structures_mirror_those_of_the_header(mirror, name):
    """A field more, less or elsewhere would shift all that the library reads after it."""
    sizes = {"int32_t": 4, "int64_t": 8}
    declared = []
    for statement in re.findall(r"typedef struct \{([^}]*)\} " + name + ";", HEADER)[0].split(";")[:-1]:
        [(kind, names)] = re.findall(r"^\s*(?:const )?(\w+\*?)\s+(.*)$", statement)
        for label, count in re.findall(r"(\w+)(?:\[(\d)\])?(?:, |$)", names):
            size = ctypes.sizeof(ctypes.c_void_p) if kind.endswith("*") else sizes[kind]
            declared.append((label, size * int(count or 1)))
    assert declared == [(label, ctypes.sizeof(kind)) for label, kind in mirror._fields_]


def test_numbers_mirror_those_of_the_header():
    numbers = {name: int(number) for name, number in re.findall(r"PS_(\w+) = (\d+)", HEADER)}
    isas = {name.upper(): number for number, name in enumerate(native.ISAS)}
    lists = {"NO_LISTS": native.NO_LISTS, "GROUPS": native.GROUPS, "SQUARES": native.SQUARES}
    dtypes = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16}
    statuses = {name.upper(): number for number, name in enumerate(native.STATUSES)}
    assert numbers == isas | lists | statuses | {name: DTYPES[dtype] for name, dtype in dtypes.items()}


@built
def test_without_an_openmp_runtime_one_thread_gives_the_same(problem):
    grid, packed, weight = problem
    handle = library.load().handle
    assert handle is not None
    expected = patch_conv2d(packed, weight, None, grid, padding=1, backend="cpp")
    handle.ps_set_runtime(None, None, None)
    try:
        alone = patch_conv2d(packed, weight, None, grid, padding=1, backend="cpp")
    finally:
        library.load.cache_clear()
        assert library.load().serial is None
    assert torch.equal(alone, expected)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_engine_brings_no_second_openmp_runtime():
    """Two runtimes would keep two pools of threads spinning against each other; in a fresh process there is one."""
    program = """
import torch
torch.set_num_threads(2)
from patchsparse import PatchGrid, patch_conv2d
grid = PatchGrid.random(2, (3, 3), keep=4)
patch_conv2d(torch.randn(8, 16, 4, 4), torch.randn(16, 16, 3, 3), None, grid, padding=1, backend="cpp")
torch.randn(512, 512) @ torch.randn(512, 512)
print(open("/proc/self/maps").read())
"""
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "_engine.so" in maps
    assert len(set(re.findall(r"lib[gi]?omp[^\s/]*\.so\S*", maps))) <= 1
