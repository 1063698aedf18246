"""The script that builds MinkowskiEngine: what it asks the compilers for, and what it says is missing."""

import sys
from argparse import ArgumentTypeError
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_minkowski.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Return the script as a module, on a machine without GPU and toolkit, with a torch for CUDA 13.0."""
    spec = spec_from_file_location("install_minkowski", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "USUAL_TOOLKIT", str(tmp_path / "nothing"))
    monkeypatch.setattr(module.shutil, "which", lambda name: None if name == "nvcc" else f"/usr/bin/{name}")
    for name in ("CUDA_HOME", "CUDA_PATH", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    return module


def toolkit(root: Path, release: str) -> Path:
    """Make a folder that looks like a CUDA toolkit without the headers of its libraries."""
    (root / "bin").mkdir(parents=True)
    (root / "include" / "cccl").mkdir(parents=True)
    (root / "include" / "cuda_runtime_api.h").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return root


def test_capabilities_are_those_given_those_of_the_gpu_or_those_of_usual_gpus(script, monkeypatch):
    parse = script.parser().parse_args
    assert script.architectures(parse([])) == "8.0;9.0"
    assert script.architectures(parse(["--arch", "8.0 9.0a,10.0+PTX"])) == "8.0;9.0a;10.0+PTX"
    assert "cuda13.0-sm8.0+9.0" in script.key(True, parse(["--device", "cuda"]))
    assert "-cpu-" in script.key(False, parse([]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert script.architectures(parse([])) == "9.0"
    with pytest.raises(ArgumentTypeError, match=r"'sm_90' is no list of compute capabilities; write it like 8.0;9.0"):
        script.capabilities_of("sm_90")
    with pytest.raises(SystemExit, match="2"):
        parse(["--arch", "90"])


def test_the_toolkit_is_found_where_it_is_named(script, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert script.toolkit() == home
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(script, "USUAL_TOOLKIT", str(home))
    assert script.toolkit() == home


def test_what_is_missing_for_cuda_is_named(script, monkeypatch, tmp_path):
    with pytest.raises(
        script.MissingError, match=r"no CUDA toolkit with nvcc; install 13.x, or name its folder in CUD"
    ):
        script.toolkit()
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "old", "12.4")))
    with pytest.raises(script.MissingError, match=r"nvcc 12.4 in .*old does not fit torch's CUDA 13.0; install toolki"):
        script.toolkit()
    broken = toolkit(tmp_path / "broken", "13.0")
    (broken / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("CUDA_HOME", str(broken))
    with pytest.raises(script.MissingError, match="does not run"):
        script.toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(script.MissingError, match="is built without CUDA; install a torch for CUDA, or --device cpu"):
        script.toolkit()


def test_without_nvcc_nothing_is_fetched_and_one_sentence_says_so(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert script.main(["--device", "cuda", "--cache", str(tmp_path / "cache")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("MinkowskiEngine was not installed: there is no CUDA toolkit with nvcc")
    assert "\n" not in told
    assert not (tmp_path / "cache").exists()


def test_what_compilers_are_told_for_cuda(script, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(script, "torch_has_blas", lambda: True)
    work = tmp_path / "work"
    work.mkdir()
    flags = script.flags(work, "g++", True, script.parser().parse_args(["--device", "cuda"]))
    include, libraries = work / "include", work / "lib"
    assert flags["CUDA_HOME"] == str(home)
    assert flags["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"
    assert flags["CFLAGS"] == flags["CXXFLAGS"] == f"-g0 -w -DNDEBUG -I{include} -I{home / 'include' / 'cccl'}"
    assert flags["LDFLAGS"] == f"-s -L{libraries}"
    assert flags["NVCC_PREPEND_FLAGS"] == f"-w -I{include} -include me_compat.cuh"
    assert (include / "me_compat.cuh").exists()
    assert (include / "cblas.h").exists()
    assert (include / "cudf" / "detail" / "nvtx" / "ranges.hpp").exists()
    assert sorted(path.name for path in libraries.iterdir()) == ["libcusparse.a", "libopenblas.a"]
    other = tmp_path / "other"
    other.mkdir()
    assert set(script.flags(other, "g++", False, script.parser().parse_args([]))) == {"CFLAGS", "CXXFLAGS", "LDFLAGS"}


@pytest.mark.parametrize(("cuda", "option"), [(True, "--force_cuda"), (False, "--cpu_only")])
def test_the_command_that_builds_is_pinned_and_takes_the_source_as_it_is(script, monkeypatch, tmp_path, cuda, option):
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / "made.whl").touch()
    ran = []

    def run(command, **_):
        ran.append(command)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(script.subprocess, "run", run)
    made = script.compile_wheel(tmp_path, tmp_path / "cache", cuda, {})
    assert made.name == "made.whl"
    (command,) = ran
    assert command[:4] == (sys.executable, "-m", "pip", "--disable-pip-version-check")
    assert {"--no-build-isolation", "--no-deps", "--require-hashes", "--no-binary=:all:"} <= set(command)
    wanted = (tmp_path / "requirements.txt").read_text()
    assert wanted.startswith(f"MinkowskiEngine==0.5.4 --hash=sha256:{script.SHA256} ")
    assert f'--config-settings="--global-option={option}"' in wanted
    assert '--config-settings="--global-option=--blas=openblas"' in wanted


def test_help_says_what_is_built_where_no_gpu_is(script):
    assert "default: that of the first GPU, else 8.0;9.0" in " ".join(script.parser().format_help().split())
