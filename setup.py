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
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
# Each file with its own instruction set; dispatch.cpp asks the processor which of them it may call.
ISA_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mfma"],
    "kernels_avx512": AVX512,
    "kernels_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "kernels_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildEngine(build_ext):
    """Compile ``csrc/*.cpp`` into ``patchsparse/_engine.so``, which ctypes loads."""

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
        special = ISA_FLAGS.get(Path(source).stem, []) if X86 else []
        try:
            return self.compiler.compile([source], self.build_temp, extra_postargs=FLAGS + special)[0]
        except CompileError:
            if not special:
                raise
            return self.compiler.compile([source], self.build_temp, extra_postargs=FLAGS)[0]


csrc = Path("csrc")
setup(
    ext_modules=[
        Extension(
            "patchsparse._engine",
            sources=[str(path) for path in sorted(csrc.glob("*.cpp"))],
            depends=[str(path) for path in sorted([*csrc.glob("*.h"), *csrc.glob("*.inl")])],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildEngine},
)
