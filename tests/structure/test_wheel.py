"""A wheel holds every module and data file of the packages, and works without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from .source import ROOT

pytestmark = pytest.mark.rest  # CI runs it; the checkout itself is what the other tests run
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
IMPORT_ALL = """
import importlib, pathlib, sys
root, *names = sys.argv[1:]
sys.path.insert(0, root)
for name in names:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(root), f"{name} comes from {module.__file__}"
"""


def sources() -> set[str]:
    """Return what a wheel must hold, by the names that it has there."""
    found = {
        path.relative_to(top).as_posix()
        for top, package in ((ROOT, "spatspark_fast"), (ROOT / "kernels", "patchsparse"))
        for path in (top / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed", ".json")
    }
    assert {"patchsparse/py.typed", "spatspark_fast/py.typed", "spatspark_fast/pretrain/presets/demo.yaml"} <= found
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the checkout, without a compiler."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")
    copy, out = tmp_path_factory.mktemp("copy") / "project", tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(
        ".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "results", "data_files"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    environment = os.environ | {"CC": "no-compiler", "CXX": "no-compiler"}
    command = [sys.executable, "-c", BUILD, str(out)]
    built = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_what_the_packages_hold(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == sources()


def test_the_wheel_brings_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "spatspark = spatspark_fast.__main__:main" in archive.read(entry_points).decode()


def test_every_module_is_imported_from_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    names = sorted(name for name in sources() if name.endswith(".py"))
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
    if find_spec("triton") is None:
        modules = [name for name in modules if ".triton" not in name]
    assert len(modules) > 100
    command = [sys.executable, "-I", "-W", "error", "-c", IMPORT_ALL, str(tmp_path / "unpacked"), *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
