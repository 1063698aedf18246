"""Build the optional C++ engine (``csrc/``); everything else is declared in ``pyproject.toml``.

The engine is a plain C library without Python or torch in it: its build needs a C++17 compiler and takes seconds.
Without one the install succeeds, says so once, and the other engines serve.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DNDEBUG",
    "-g0",
]
CSRC = Path("csrc")
ISA_TABLE = CSRC / "kernels" / "flags.txt"
X86 = platform.machine().lower() in ("x86_64", "amd64")


def isa_flags() -> dict[str, list[str]]:
    """Return the flags of each file with its own instruction set, by stem; runtime/dispatch.cpp asks the processor."""
    rows = [line.split() for line in ISA_TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return {stem: flags for stem, *flags in rows} if X86 else {}


def files(*suffixes: str) -> list[str]:
    """Return the files of ``csrc`` and its folders that end so."""
    return sorted(str(path) for path in CSRC.rglob("*") if path.suffix in suffixes)


class BuildEngine(build_ext):
    """Compile every ``.cpp`` file below ``csrc`` into ``patchsparse/_engine.so``, which ctypes loads."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the same file name on every Python: the library is not tied to one."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export what ``engine.h`` marks, and no module initialiser."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile the files side by side and link them; a failure is reported once and ends nothing."""
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(self.compile_source, ext.sources))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(objects, str(target), target_lang="c++")
        except Exception as error:  # whatever the compiler did, the package works without it
            target.unlink(missing_ok=True)
            self.warn(f"the C++ engine was not built ({error}); the other engines serve in its place")

    def compile_source(self, source: str) -> str:
        """Compile one file with its instruction set, or without if the compiler does not know it."""
        special = isa_flags().get(Path(source).stem, [])
        try:
            return self.compile_with(source, FLAGS + special)
        except CompileError:
            if not special:
                raise
            return self.compile_with(source, FLAGS)

    def compile_with(self, source: str, flags: list[str]) -> str:
        """Compile one file and return its object; files include each other by their path in ``csrc``."""
        return self.compiler.compile([source], self.build_temp, include_dirs=[str(CSRC)], extra_postargs=flags)[0]


setup(
    ext_modules=[
        Extension(
            "patchsparse._engine",
            sources=files(".cpp"),
            depends=[*files(".h", ".inl"), str(ISA_TABLE)],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildEngine},
)
