"""Build MinkowskiEngine 0.5.4 from its source distribution and install it into the active environment.

``python scripts/install_minkowski.py`` gives the ``minkowski`` engine of patchsparse, for CUDA where torch sees a GPU
and for the CPU elsewhere. ``--device cuda`` also builds without a GPU, for compute capabilities 8.0 and 9.0; it needs a
torch for CUDA and nvcc of the same major version. The source is taken unmodified by pip, pinned by its sha256; a few
headers in ``scripts/minkowski`` let today's compilers take it, and lend it the BLAS inside torch. Nothing in the
environment changes until the wheel is there. The wheel is kept in ``${XDG_CACHE_HOME:-~/.cache}/spatspark-fast``, by
versions of torch and Python and by device, so that a second installation takes seconds.

Exit codes: 0 installed; 1 the build or the check failed; 2 it cannot be built here (no compiler, nvcc, BLAS or
network; the sentence says which).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

VERSION = "0.5.4"
SHA256 = "b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"
TOOLS = ("pip>=24.1", "setuptools>=77,<82", "wheel", "ninja")
CAPABILITIES = "8.0;9.0"  # of A100 and H100, H200: what is built for where torch sees no GPU
USUAL_TOOLKIT = "/usr/local/cuda"
HEADERS = Path(__file__).resolve().parent / "minkowski"
COMPILES = "building 'MinkowskiEngineBackend._C' extension"  # what setuptools says when all is fetched
CHECK = """
import collections, collections.abc
collections.Sequence = collections.abc.Sequence
import torch, MinkowskiEngine as ME
where = torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.int32, device={device!r})
x = ME.SparseTensor(torch.ones(2, 4, device={device!r}), where)
conv = ME.MinkowskiConvolution(4, 8, kernel_size=3, dimension=2).to({device!r})
assert conv(x).F.shape == (2, 8)
"""


class MissingError(Exception):
    """It cannot be built on this machine; the message says what is missing."""


class BrokenError(Exception):
    """The build or its check failed."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parser().parse_args(argv)
    started = time.monotonic()
    try:
        cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        folder = options.cache / "minkowski" / key(cuda, options)
        wheel = next(folder.glob("*.whl"), None)
        if cuda and wheel is None:
            toolkit()  # says what is missing before anything is fetched
        if wheel is None:
            wheel = build(cuda, folder, options)
        if not options.wheel_only:
            install(wheel, cuda)
    except (MissingError, BrokenError) as error:
        say(f"MinkowskiEngine was not installed: {error}")
        return 2 if isinstance(error, MissingError) else 1
    done = "built" if options.wheel_only else "installed"
    say(f"MinkowskiEngine {VERSION} is {done} for {'CUDA' if cuda else 'the CPU'} ({time.monotonic() - started:.0f} s)")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spatspark-fast"
    made = argparse.ArgumentParser(description="Build and install MinkowskiEngine 0.5.4 into the active environment.")
    made.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if torch sees a GPU"
    )
    capabilities = f"compute capabilities for CUDA, such as 9.0; default: that of the first GPU, else {CAPABILITIES}"
    made.add_argument("--arch", type=capabilities_of, metavar="LIST", help=capabilities)
    made.add_argument("--jobs", type=int, help="compilers at once; default: by cores and free memory")
    made.add_argument("--optimise", default="3", choices=("0", "1", "2", "3"), help="for CI: 0 compiles fastest")
    made.add_argument("--cache", type=Path, default=cache, help=f"folder that keeps wheels; default {cache}")
    made.add_argument("--wheel-only", action="store_true", help="build and keep the wheel, install nothing")
    return made


def say(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def key(cuda: bool, options: argparse.Namespace) -> str:
    """Return the name of the folder of a wheel: everything that its binary depends on."""
    headers = sorted(path for path in HEADERS.rglob("*") if path.is_file())
    content = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()[:8]
    device = f"cuda{torch.version.cuda}-sm{architectures(options).replace(';', '+')}" if cuda else "cpu"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    parts = (f"torch{torch.__version__}", python, platform.machine(), device, f"O{options.optimise}", content)
    return "-".join(parts)


def capabilities_of(text: str) -> str:
    """Return compute capabilities as torch's builds take them, ``"8.0;9.0"``; raise ArgumentTypeError if it is none."""
    found = re.split(r"[;, ]+", text.strip())
    if not all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", one) for one in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of compute capabilities; write it like 8.0;9.0")
    return ";".join(found)


def architectures(options: argparse.Namespace) -> str:
    """Return the compute capabilities to compile for: those given, that of the GPU, or those of usual GPUs."""
    if options.arch:
        return options.arch
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else CAPABILITIES


def build(cuda: bool, folder: Path, options: argparse.Namespace) -> Path:
    """Compile the wheel and put it into ``folder``."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise MissingError("there is no C++ compiler; install g++, or name one in CXX")
    with tempfile.TemporaryDirectory(prefix="minkowski-") as name:
        work = Path(name)
        environment = dict(os.environ, **tools(work, compiler, options.optimise))
        jobs = options.jobs or most_jobs(5 if cuda else 2)
        environment["MAX_JOBS"] = str(jobs)
        environment |= flags(work, compiler, cuda, options)
        minutes = (80 if cuda else 8) / jobs
        say(f"building MinkowskiEngine {VERSION}: some {max(1, round(minutes))} minutes, {jobs} compilers at once ...")
        made = compile_wheel(work, folder, cuda, environment)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / made.name
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made, partial)
        partial.replace(kept)  # at once, so that no other process sees half a wheel
    return kept


def most_jobs(gigabytes: int) -> int:
    """Return how many compilers fit the cores and the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    return max(1, min(cores, int(memory / gigabytes)))


def tools(work: Path, compiler: str, optimise: str) -> dict[str, str]:
    """Put build tools beside the environment, not into it; return the variables that lead to them.

    The source's setup.py calls ``pip uninstall`` and asks for ``-O3`` after any other flag: it meets a ``pip`` that
    does nothing, and a compiler that is told the level last. A new pip passes a requirement's settings to its build.
    """
    folder, bin_folder = work / "tools", work / "bin"
    bin_folder.mkdir()
    scripts = {"pip": "exit 0", "c++-last-level": f'exec "{compiler}" "$@" -O{optimise}'}
    for name, text in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    command = (*pip(), "install", "--quiet", "--no-deps", "--target", str(folder), *TOOLS)
    if subprocess.run(command, check=False).returncode != 0:
        raise MissingError(f"pip could not fetch the build tools {', '.join(TOOLS)}")
    before = (os.environ.get("PATH", ""), os.environ.get("PYTHONPATH", ""))
    told = compiler if optimise == "3" else str(bin_folder / "c++-last-level")
    return {
        "PATH": os.pathsep.join((str(bin_folder), str(folder / "bin"), before[0])),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), before[1]))),
        "CXX": told,
        "CC": told,
    }


def pip() -> tuple[str, ...]:
    """Return the words that begin a command of pip."""
    return sys.executable, "-m", "pip", "--disable-pip-version-check"


def flags(work: Path, compiler: str, cuda: bool, options: argparse.Namespace) -> dict[str, str]:
    """Return the compilers' variables; headers and empty archives of what torch already holds go to ``work``."""
    include, libraries = work / "include", work / "lib"
    include.mkdir()
    libraries.mkdir()
    if torch_has_blas():
        shutil.copy(HEADERS / "cblas.h", include)
        empty_archive(libraries / "libopenblas.a")
    elif not has_openblas(compiler, work):
        raise MissingError("torch lends no BLAS here; install OpenBLAS with its headers (Debian: libopenblas-dev)")
    common = f"-g0 -w -DNDEBUG -I{include}"
    variables = {"CFLAGS": common, "CXXFLAGS": common, "LDFLAGS": f"-s -L{libraries}"}
    return variables | (cuda_flags(work, include, libraries, common, options) if cuda else {})


def cuda_flags(work: Path, include: Path, libraries: Path, common: str, options: argparse.Namespace) -> dict[str, str]:
    """Return what nvcc needs besides, with headers of torch's own CUDA packages where the toolkit lacks them."""
    home = toolkit()
    shutil.copytree(HEADERS / "cuda", include, dirs_exist_ok=True)
    empty_archive(libraries / "libcusparse.a")  # torch brings the library itself
    site = Path(torch.__file__).parents[1] / "nvidia"
    found = [home / "include", *site.glob("cu*/include"), *site.glob("*/include")]
    whole = all((home / "include" / name).exists() for name in ("cublas_v2.h", "cusparse.h", "cusolverDn.h"))
    paths = [] if whole else [str(path) for path in found[1:]]
    if not any((path / "curand.h").exists() for path in found):
        stub = work / "stub"
        stub.mkdir()
        shutil.copy(HEADERS / "cuda" / "curand_stub.h", stub / "curand.h")
        paths.append(str(stub))
    cccl = next((f" -I{path / 'cccl'}" for path in found if (path / "cccl").is_dir()), "")
    searched = os.pathsep.join((*paths, *filter(None, (os.environ.get("CPATH"),))))
    return {
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": architectures(options),
        "CFLAGS": common + cccl,
        "CXXFLAGS": common + cccl,
        "NVCC_PREPEND_FLAGS": f"-w -I{include} -include me_compat.cuh",
        **({"CPATH": searched} if searched else {}),
    }


def toolkit() -> Path:
    """Return the root of a CUDA toolkit that fits torch; the nvcc on the PATH may be a link or a script elsewhere."""
    if torch.version.cuda is None:
        raise MissingError(
            f"torch {torch.__version__} is built without CUDA; install a torch for CUDA, or --device cpu"
        )
    major = torch.version.cuda.partition(".")[0]
    nvcc = shutil.which("nvcc")
    given = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1])
    for home in map(Path, (*filter(None, given), USUAL_TOOLKIT)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            found = nvcc_version(home)
            if found.partition(".")[0] != major:
                remedy = f"install toolkit {major}.x and name its folder in CUDA_HOME"
                raise MissingError(f"nvcc {found} in {home} does not fit torch's CUDA {torch.version.cuda}; {remedy}")
            return home
    raise MissingError(f"there is no CUDA toolkit with nvcc; install {major}.x, or name its folder in CUDA_HOME")


def nvcc_version(home: Path) -> str:
    """Return the release of a toolkit's nvcc, such as ``"13.0"``; raise MissingError if it does not run."""
    try:
        told = subprocess.run((str(home / "bin" / "nvcc"), "--version"), capture_output=True, text=True, check=True)
        return re.findall(r"release (\d+\.\d+)", told.stdout)[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise MissingError(f"{home / 'bin' / 'nvcc'} does not run ({error})") from error


def torch_has_blas() -> bool:
    """Return whether torch's own library exports a BLAS, as x86-64 wheels do with their MKL."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        return all(hasattr(library, name) for name in ("sgemm_", "dgemm_", "saxpy_", "daxpy_"))
    except OSError:
        return False


def empty_archive(path: Path) -> None:
    """Write a static library without members: the linker finds the name, the loader the symbols in torch."""
    path.write_bytes(b"!<arch>\n")


def has_openblas(compiler: str, work: Path) -> bool:
    """Return whether a program with OpenBLAS and its header compiles and links."""
    probe = work / "probe.cpp"
    probe.write_text("#include <cblas.h>\nint main() { return cblas_sgemm == nullptr; }\n")
    command = (compiler, str(probe), "-lopenblas", "-o", str(work / "probe"))
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compile_wheel(work: Path, folder: Path, cuda: bool, environment: Mapping[str, str]) -> Path:
    """Let pip fetch the source, check its sha256 and compile it; return the wheel."""
    wanted, out = work / "requirements.txt", work / "wheel"
    given = ("--force_cuda" if cuda else "--cpu_only", "--blas=openblas")
    settings = " ".join(f'--config-settings="--global-option={option}"' for option in given)
    wanted.write_text(f"MinkowskiEngine=={VERSION} --hash=sha256:{SHA256} {settings}\n")
    command = (
        *(*pip(), "wheel", "--verbose", "--no-cache-dir", "--use-pep517", "--no-build-isolation", "--no-deps"),
        *("--require-hashes", "--no-binary=:all:", "--requirement", str(wanted), "--wheel-dir", str(out)),
    )
    run = subprocess.run(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if run.returncode == 0:
        return next(out.glob("*.whl"))
    log = folder / "build.log"
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text(run.stdout)
    lines = [line.strip() for line in run.stdout.splitlines() if re.search(r"\b(error|not found)\b", line, re.I)]
    say("\n".join(lines[:20]))
    if COMPILES in run.stdout or "DO NOT MATCH THE HASHES" in run.stdout:
        raise BrokenError(f"it did not compile; see {log}")
    raise MissingError(f"its source distribution could not be fetched or prepared; see {log}")


def install(wheel: Path, cuda: bool) -> None:
    """Install the wheel and run a convolution with it."""
    command = (*pip(), "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    if subprocess.run(command, check=False).returncode != 0:
        raise BrokenError(f"pip could not install {wheel}")
    device = "cuda" if cuda and torch.cuda.is_available() else "cpu"
    check = subprocess.run(
        (sys.executable, "-c", CHECK.format(device=device)), capture_output=True, text=True, check=False
    )
    if check.returncode != 0:
        raise BrokenError(f"{wheel} is installed and does not work; delete it to build it again:\n{check.stderr}")


if __name__ == "__main__":
    sys.exit(main())
