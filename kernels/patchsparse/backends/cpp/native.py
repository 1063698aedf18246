"""Load the compiled CPU engine (``csrc/``): a plain C library, found beside this package and called through ctypes."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["AMX", "BF16", "ISA", "ISAS", "Conv", "Depthwise", "Geometry", "Library", "Pool", "Wgrad", "library"]

ABI = 4
ISA = "PATCHSPARSE_ISA"
ENGINE = "PATCHSPARSE_ENGINE"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
AMX = ISAS.index("amx")
BF16 = ISAS.index("avx512_bf16")  # the first that multiplies bfloat16 itself
HOW = (
    "reinstall with a C++17 compiler on the PATH (`pip install --force-reinstall --no-deps .`); "
    "the other engines do not need it"
)

_Pair = c_int32 * 2
_Strides = c_int64 * 4


class Geometry(ctypes.Structure):
    """``ps_geometry`` of ``csrc/engine.h``."""

    _fields_ = (
        *((name, c_int32) for name in ("patches", "grid_rows", "grid_columns", "adjoint", "lists")),
        *((name, _Pair) for name in ("source", "kernel", "stride", "padding", "dilation")),
    )


_TAIL = (("dtype", c_int32), ("isa", c_int32), ("threads", c_int32))
_WEIGHT = ("weight_dtype", c_int32)
_CHANNELS = (("source_channels", c_int64), ("target_channels", c_int64))


class Conv(ctypes.Structure):
    """``ps_conv_args``."""

    _fields_ = (
        *(("plan", c_void_p), ("source", c_void_p), ("weight", c_void_p), ("weight_stride", _Strides)),
        *(("bias", c_void_p), ("target", c_void_p), *_CHANNELS, _WEIGHT, *_TAIL),
    )


class Wgrad(ctypes.Structure):
    """``ps_wgrad_args``."""

    _fields_ = (
        *(("plan", c_void_p), ("source", c_void_p), ("target", c_void_p), ("weight", c_void_p)),
        *(("weight_stride", _Strides), *_CHANNELS, _WEIGHT, *_TAIL),
    )


class Depthwise(ctypes.Structure):
    """``ps_depthwise_args``."""

    _fields_ = (
        *((name, c_void_p) for name in ("plan", "source", "weight", "bias", "target")),
        *(("channels", c_int64), ("flip", c_int32), *_TAIL),
    )


class Pool(ctypes.Structure):
    """``ps_pool_args``."""

    _fields_ = (
        *(("plan", c_void_p), ("source", c_void_p), ("tap", POINTER(c_uint8)), ("target", c_void_p)),
        *(("channels", c_int64), *_TAIL),
    )


class Library(NamedTuple):
    """The loaded engine, or why there is none.

    Attributes:
        handle: the ctypes library, None if missing.
        problem: why it is missing, and the remedy; None if loaded.
        isas: names of the instruction sets that this processor and this build can run, least first.
        serial: why only one thread can be used; None if the process has an OpenMP runtime to borrow.
    """

    handle: ctypes.CDLL | None
    problem: str | None
    isas: tuple[str, ...] = ()
    serial: str | None = None

    def isa(self) -> int:
        """Return the number of the instruction set to use: the best, or what ``PATCHSPARSE_ISA`` names.

        Raises:
            RuntimeError: if the named instruction set is unknown or cannot run here.
        """
        wanted = os.environ.get(ISA) or self.isas[-1]
        if wanted not in self.isas:
            raise RuntimeError(f"{ISA}={wanted} cannot run here; choose one of {', '.join(self.isas)}")
        return ISAS.index(wanted)


@cache
def library() -> Library:
    """Load the engine on first use; the result says why if that fails.

    The environment variable ``PATCHSPARSE_ENGINE`` names another build, such as one with sanitizers.
    """
    path = Path(os.environ.get(ENGINE) or Path(__file__).parents[2] / "_engine.so")
    if not path.exists():
        return Library(None, f"the C++ engine was not built ({path.name} is missing); {HOW}")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, f"{path.name} cannot be loaded ({error}); {HOW}")
    if handle.ps_abi() != ABI:
        return Library(None, f"{path.name} has interface {handle.ps_abi()}, this version needs {ABI}; {HOW}")
    _declare(handle)
    isas = tuple(name for number, name in enumerate(ISAS) if handle.ps_isa_supported(number))
    return Library(handle, None, isas, _borrow_threads(handle))


def _declare(handle: ctypes.CDLL) -> None:
    handle.ps_set_runtime.argtypes = [c_void_p, c_void_p, c_void_p]
    handle.ps_set_runtime.restype = None
    handle.ps_plan_create.argtypes = [POINTER(Geometry), c_void_p, c_void_p, c_int32]
    handle.ps_plan_create.restype = c_void_p
    handle.ps_plan_destroy.argtypes = [c_void_p]
    handle.ps_plan_destroy.restype = None
    handle.ps_plan_statistics.argtypes = [c_void_p, POINTER(c_int64)]
    handle.ps_plan_statistics.restype = None
    for name, args in (
        ("ps_conv", Conv),
        ("ps_wgrad", Wgrad),
        ("ps_winograd_conv", Conv),
        ("ps_winograd_wgrad", Wgrad),
        ("ps_depthwise", Depthwise),
        ("ps_depthwise_wgrad", Depthwise),
        ("ps_max_pool", Pool),
        ("ps_max_pool_grad", Pool),
    ):
        function = getattr(handle, name)
        function.argtypes, function.restype = [POINTER(args)], c_int32


def _borrow_threads(handle: ctypes.CDLL) -> str | None:
    """Hand the engine the OpenMP runtime that torch has loaded, so that there is one pool of threads, not two."""
    try:
        process = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = [ctypes.cast(getattr(process, name), c_void_p) for name in names]
    except (AttributeError, OSError, TypeError) as error:
        return f"no OpenMP runtime in the process to borrow threads from ({error}); one thread is used"
    handle.ps_set_runtime(*found)
    return None
