"""Build the C modules that Triton 3.6 makes at the first launch of a kernel, so that a cache brings them along.

Each signature of a kernel has a module of its own, which takes a C compiler a third of a second, and one more reads the
card. Later versions of Triton launch without such modules. They are linked to the driver's library, ``libcuda.so.1``;
where there is none an empty one stands for it while they are built, and the real one is found when they are loaded.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver
from triton.runtime.cache import get_cache_manager

__all__ = ["build_launchers"]


def build_launchers(sources: Iterable[tuple[Any, Any]]) -> int:
    """Put the modules of kernels into Triton's cache; return how many were not there.

    Args:
        sources: kernels and their metadata, as ``Seen.sources`` holds them.
    """
    made: Any = driver
    if not hasattr(made, "make_launcher"):
        return 0
    texts = {"__triton_launcher": set(), "cuda_utils": {Path(made.dirname, "driver.c").read_text()}}
    for src, metadata in sources:
        texts["__triton_launcher"].add(_text(made, src, metadata))
    return sum(_build(made, name, text) for name, found in texts.items() for text in sorted(found))


def _text(made: Any, src: Any, metadata: Any) -> str:
    """Return the C code of a kernel's module, as Triton's own launcher asks for it."""
    names = src.fn.arg_names
    constants = {(names.index(i),) if isinstance(i, str) else i: value for i, value in src.constants.items()}
    return made.make_launcher(constants, dict(src.signature), getattr(metadata, "tensordesc_meta", None))


def _build(made: Any, name: str, text: str) -> bool:
    """Build a module unless it is in the cache; return whether it was built."""
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    caches = [get_cache_manager(hashlib.sha256((text + key).encode()).hexdigest()) for key in _platforms()]
    if all(cache.get_file(file) for cache in caches):
        return False
    with tempfile.TemporaryDirectory() as folder:
        empty, source, module = Path(folder, "libcuda.so.1"), Path(folder, f"{name}.c"), Path(folder, file)
        source.write_text(text)
        subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", empty], check=True)
        headers = [f"-I{path}" for path in (*made.include_dirs, sysconfig.get_paths()["include"])]
        options = ["-O3", "-shared", "-fPIC", "-Wno-psabi", *headers]
        driver_library = ["-Wl,--no-as-needed", f"-L{folder}", "-l:libcuda.so.1"]  # named, though it has nothing
        subprocess.run(["gcc", *options, source, *driver_library, "-o", module], check=True)
        for cache in caches:
            cache.put(module.read_bytes(), file, binary=True)
    return True


def _platforms() -> list[str]:
    """Return what Triton adds to the key of a module: with the format of programs where ``file`` is installed."""
    machine, system, (bits, _) = platform.machine(), platform.system(), platform.architecture()
    return [",".join([machine, system, bits, linkage]) for linkage in ("ELF", "")]
