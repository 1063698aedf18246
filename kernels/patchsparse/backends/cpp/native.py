"""The mirror of ``csrc/engine.h`` for ctypes: its numbers, structures and functions."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_void_p

__all__ = [
    "ABI",
    "BF16",
    "GROUPS",
    "ISAS",
    "NO_LISTS",
    "SQUARES",
    "STATUSES",
    "Conv",
    "Depthwise",
    "Geometry",
    "Pool",
    "Wgrad",
    "check_status",
    "declare",
]

ABI = 5  # what ``ps_abi`` returns
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
BF16 = ISAS.index("avx512_bf16")  # the first that multiplies bfloat16 itself
NO_LISTS, GROUPS, SQUARES = range(3)  # what a plan holds besides the halo

STATUSES = ("ok", "no_memory", "invalid", "refused", "failed")
_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "no_memory": (MemoryError, "ran out of memory for {}; use a smaller batch or smaller patches"),
    "invalid": (ValueError, "found maps or numbers out of range for {}; see patchsparse.PatchGrid"),
    "refused": (RuntimeError, "does not offer {} for this dtype, geometry or instruction set"),
    "failed": (RuntimeError, "failed at {}, for a reason that it does not know"),
}
_Pair = c_int32 * 2
_Strides = c_int64 * 4


class Geometry(ctypes.Structure):
    """``ps_geometry`` of ``csrc/engine.h``."""

    _fields_ = (
        *((name, c_int32) for name in ("images", "patches", "grid_rows", "grid_columns", "adjoint", "lists")),
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


def check_status(status: int, what: str) -> None:
    """Raise what a status of the library says of ``what`` it was asked for.

    Raises:
        MemoryError: if there was no memory, in whichever thread.
        ValueError: for numbers or maps that lead out of images and packed rows.
        RuntimeError: for what is not offered, and anything else.
    """
    if status:
        error, words = _ERRORS[STATUSES[status]]
        raise error(f"the C++ engine {words.format(what)}")


def declare(handle: ctypes.CDLL) -> None:
    """Tell ctypes the arguments and results of the library's functions."""
    handle.ps_set_runtime.argtypes = [c_void_p, c_void_p, c_void_p]
    handle.ps_set_runtime.restype = None
    handle.ps_plan_create.argtypes = [POINTER(Geometry), c_void_p, c_void_p, c_int32, POINTER(c_void_p)]
    handle.ps_plan_create.restype = c_int32
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
