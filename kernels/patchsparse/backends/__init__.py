"""The engines, one module each, and the one place where a call chooses among them.

Every engine module has ``why_unusable(device, dtype)``, ``why_not(call)``, ``how(call)`` and a function for each
operation that ``BODIES`` lists for it. Engines are imported when they are first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from ..eager import once
from ..geometry import LARGEST, Call
from ..processor import ISA

__all__ = [
    "BODIES",
    "BOTH_GRADIENTS_AT_ONCE",
    "DTYPES",
    "ENGINES",
    "FUSED_NORMS",
    "OPERATIONS",
    "OVERRIDE",
    "check",
    "check_name",
    "choose",
    "engine",
    "leaves",
    "order",
    "requested",
    "why_not",
    "why_unusable",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ENGINES = ("triton", "cpp", "gather", "minkowski", "dense")
OVERRIDE = "PATCHSPARSE_BACKEND"

_CONVOLUTION = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")
_MAX_POOL = ("max_pool2d", "max_pool2d_grad")
_NORMS = ("batch_norm_act", "batch_norm_act_grad", "batch_norm_unpack", "batch_norm_unpack_grad")
_IMAGES = ("image_conv2d", "image_conv_transpose2d", "image_grid")
_LOCAL = ("product", "local_conv2d", "local_max_pool2d", "local_avg_pool2d")
# Operations that PyTorch has itself. An engine may replace it there, but only in a plain call.
_REPLACED = ("product", *_IMAGES)

OPERATIONS = (
    *_CONVOLUTION,
    "conv2d_gradients",
    *_MAX_POOL,
    "avg_pool2d",
    "avg_pool2d_grad",
    *_NORMS,
    *_LOCAL,
    *_IMAGES,
)
# Which engine has a body of its own for which operation. What an engine lacks runs in ``gather``.
BODIES: dict[str, tuple[str, ...]] = {
    "triton": (*_CONVOLUTION, *_MAX_POOL, *_NORMS),
    "cpp": (*_CONVOLUTION, *_MAX_POOL, *_REPLACED),
    "gather": OPERATIONS,
    "minkowski": (*_CONVOLUTION, "conv2d_gradients"),
    "dense": (*_CONVOLUTION, *_MAX_POOL),
}
# Engines whose batch norm with residual and activation is faster than PyTorch's three operations one after the other.
# On a CPU they are not: gather's takes four to six times as long (benchmarks/test_norm.py).
FUSED_NORMS = ("triton",)
# Engines that compute the input and the weight gradient in one pass, faster than one after the other.
BOTH_GRADIENTS_AT_ONCE = ("minkowski",)


@cache
def engine(name: str) -> ModuleType:
    """Return the module of an engine.

    Raises:
        ValueError: for a name that is not one.
        ImportError: if the package that the engine is written in is not installed.
    """
    check_name(name)
    return import_module(f"{__name__}.{name}")


def check_name(name: str) -> None:
    """Raise ValueError for a name that is not an engine's."""
    if name not in ENGINES:
        raise ValueError(f"backend {name!r} is unknown; choose one of auto, {', '.join(ENGINES)}")


@cache
def _why_missing(name: str) -> str | None:
    """Return why the module of an engine cannot be imported, or None if it can."""
    try:
        engine(name)
    except ImportError as error:
        return f"it cannot be imported here ({error})"
    return None


@torch.compiler.assume_constant_result
def why_unusable(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Return why an engine cannot run here on ``device`` (``"cpu"`` or ``"cuda"``) and ``dtype``, or None if it can.

    Raises:
        ValueError: for an unknown name.
    """
    return _why_missing(name) or engine(name).why_unusable(device, dtype)


def leaves(name: str, call: Call) -> str | None:
    """Return why an engine leaves a call to ``gather`` though it runs here, or None if it takes the call itself."""
    if name == "gather":
        return None
    if call.operation not in BODIES[name]:
        return f"has no {call.operation} of its own"
    if not call.plain and call.operation in _REPLACED:
        return "leaves this to PyTorch under autocast, in torch.compile and for subclasses of Tensor"
    if call.num_active == 0 or call.device == "meta":
        return "has nothing to compute"
    return engine(name).leaves(call) if call.operation in _REPLACED else None


def why_not(name: str, call: Call) -> str | None:
    """Return why an engine cannot run a call, or None if it can, or leaves it to ``gather``.

    Raises:
        ValueError: for an unknown name.
    """
    check_name(name)
    return _why_not(name, call, leaves(name, call) is not None)


def _why_not(name: str, call: Call, left: bool) -> str | None:
    if name == "gather":
        return None  # it always can, and torch.compile need not ask its module
    if left:
        return None if call.device == "meta" else why_unusable(name, call.device, call.dtype)
    return _why_missing(name) or engine(name).why_not(call)


def order(call: Call) -> tuple[str, ...]:
    """Return the engines that ``"auto"`` tries for a call, best first, by measurement (``benchmarks/``)."""
    best = "triton" if call.device == "cuda" else "cpp"
    if leaves(best, call) is not None or (best == "cpp" and not engine("cpp").pays(call)):
        return ("gather",)
    return best, "gather"


def check(call: Call) -> None:
    """Raise for a call that no engine computes; it is asked once for all calls alike.

    Raises:
        ValueError: for a stencil, patches, channels or groups out of range, which an engine would follow anywhere.
        TypeError: for a dtype that is not a float one.
    """
    name, (channels, out), stencil = call.operation, (call.in_channels, call.out_channels), call.stencil
    if name in _IMAGES:  # PyTorch's own; an engine that takes one asks again for patches
        return
    if call.dtype not in DTYPES:
        raise TypeError(f"{name} takes float64, float32, bfloat16 and float16, not {call.dtype}; use x.float()")
    if name in _NORMS:
        return
    if min(channels, out) < 1 or max(channels, out) > LARGEST:
        raise ValueError(f"{name}: {channels} channels in and {out} out; it takes at least one of both")
    if not 1 <= call.groups <= channels or channels % call.groups or out % call.groups:
        raise ValueError(f"{name}: groups={call.groups} must be 1 or more and divide {channels} and {out} channels")
    if min(call.size) < 1:
        raise ValueError(f"{name}: it takes patches and images of one pixel or more, got {call.size[0]}x{call.size[1]}")
    if name in (*_CONVOLUTION, "conv2d_gradients"):
        _check_reach(call, 0, [max(0, d - s) for d, s in zip(stencil.dilation, stencil.stride, strict=True)])
    elif name in (*_MAX_POOL, "avg_pool2d", "avg_pool2d_grad"):
        _check_reach(call, 1, (0, 0))
    else:
        stencil.check_range(name)


def _check_reach(call: Call, up: int, extra: Sequence[int]) -> None:
    """Raise ValueError unless the stencil maps patches to patches, up to what a caller chose before.

    Pooling may round the number of its outputs up (``up`` = 1); the stencil of a transposed convolution reaches
    ``extra`` pixels less on the other side, those of ``output_padding``.
    """
    stencil = call.stencil
    stencil.check_range(call.operation)
    for p, k, s, pad, d, more in zip(
        call.size, stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, extra, strict=True
    ):
        reach = d * (k - 1)
        if p % s or not (reach + 1 - s) - up * (s - 1) <= 2 * pad <= reach + more:
            raise ValueError(
                f"{call.operation}: kernel {k}, stride {s}, padding {pad}, dilation {d} does not map patches of {p} "
                "pixels to patches; see patchsparse.patch_conv2d"
            )


def requested(backend: str) -> str:
    """Return the backend that is asked for: ``PATCHSPARSE_BACKEND`` replaces ``"auto"``."""
    return os.environ.get(OVERRIDE) or "auto" if backend == "auto" else backend


def choose(call: Call, backend: str) -> str:
    """Return the name of the engine that takes a call.

    Args:
        call: what is asked for.
        backend: ``"auto"`` or a name. The environment variable ``PATCHSPARSE_BACKEND`` replaces ``"auto"``.

    Raises:
        ValueError: for an unknown name, or numbers that no engine computes with.
        TypeError: for a dtype that none computes with.
        RuntimeError: if the named engine cannot run here, or not this call, with its reason.
    """
    by_isa = call.device == "cpu" and call.operation in BODIES["cpp"]
    return _choice(call, requested(backend), os.environ.get(ISA) if by_isa else None)


@once
def _choice(call: Call, name: str, isa: str | None) -> str:
    """Choose for what is requested; ``isa`` is what the C++ engine reads of the environment, so that it is a key."""
    check(call)
    if name == "auto":
        best = order(call)[0]
        return best if best == "gather" or _why_not(best, call, left=False) is None else "gather"
    check_name(name)
    left = leaves(name, call) is not None
    reason = _why_not(name, call, left)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run {call.operation}: {reason}")
    return "gather" if left else name
