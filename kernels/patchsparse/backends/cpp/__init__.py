"""The ``cpp`` engine: indirect GEMM through the slot map on the CPU, compiled from ``csrc/`` (see its README).

Inactive neighbours cost nothing: target rows are grouped by the taps that are active for them, and a group is one
matrix product whose rows are found by index. Weights are packed in panels once per call. bfloat16 is read and written
as it is and summed in float32; where nothing multiplies it, images are widened first. Results do not depend on the
number of threads.

3x3 convolutions of stride 1 go another way where patches have even sides (:func:`winograd`): 16 products for 2x2
outputs instead of 36, or as many as are active. bfloat16 goes this way where the processor does not multiply it itself.

``library`` loads what is compiled and ``native`` mirrors its interface; ``plans`` has the row lists of a mask, and
``choice`` says which calls this engine takes and how it runs them.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from ...geometry import Stencil
from ...layout import packed_empty, packed_like
from . import library, native
from .choice import DTYPES, how, leaves, multiplies_bfloat16, pays, why_not, why_unusable, winograd
from .plans import Plan, adjoint_plan, lists_of, plan_for

__all__ = [
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "how",
    "leaves",
    "max_pool2d",
    "max_pool2d_grad",
    "pays",
    "why_not",
    "why_unusable",
    "winograd",
]

Size = tuple[int, int]


def _run(name: str, args: Any) -> None:
    if status := getattr(library.engine(), name)(byref(args)):
        native.check_status(status, name)


def _how(x: Tensor) -> tuple[int, int, int]:
    return DTYPES[x.dtype], library.load().isa_number(), torch.get_num_threads()


def _compute(x: Tensor, groups: int) -> Tensor:
    """Return ``x`` packed, and widened where the engine has no kernel for its dtype."""
    as_it_is = x.dtype != torch.bfloat16 or (groups == 1 and multiplies_bfloat16())
    return packed_like(x) if as_it_is else _widened(x)


def _parameters(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    """Return weights and bias as a convolution of ``x`` reads them: in the dtype of its sums.

    bfloat16 weights stay as they are, but for depthwise ones: they are widened while they are packed. A bias stays
    where the processor multiplies bfloat16 itself.
    """
    if x.dtype != torch.bfloat16 and weight.dtype == x.dtype:
        return weight, None if bias is None else bias.contiguous()
    sums = x.dtype if x.dtype != torch.bfloat16 or multiplies_bfloat16() else torch.float32
    narrow = groups == 1 and weight.dtype == torch.bfloat16
    return weight if narrow else weight.to(sums), None if bias is None else bias.to(sums).contiguous()


def _widened(x: Tensor) -> Tensor:
    return packed_like(x.float() if x.dtype == torch.bfloat16 else x)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    dtype = x.dtype
    fast = winograd(dtype, _size(x), (x.shape[1], weight.shape[0]), stencil, groups)
    x = packed_like(x) if fast else _compute(x, groups)
    weight, bias = _parameters(x, weight, bias, groups)
    plan = plan_for(slot, coords, _size(x), stencil, False, lists_of(groups, fast))
    out = packed_empty(x, x.shape[0], weight.shape[0], *stencil.output_size(_size(x)))
    if groups == 1:
        _multiply(plan, x, weight, weight.stride(), bias, out, fast)
    else:
        _depthwise(plan, x, weight, bias, out, False)
    return _narrowed(out, dtype)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the input gradient ``(N, C_in, ph, pw)``."""
    dtype = grad.dtype
    fast = winograd(dtype, size, (weight.shape[1], weight.shape[0]), stencil, groups)
    grad = packed_like(grad) if fast else _compute(grad, groups)
    weight, _ = _parameters(grad, weight, None, groups)
    plan, flip = adjoint_plan(slot, coords, _size(grad), stencil, lists_of(groups, fast))
    out = packed_empty(grad, grad.shape[0], weight.shape[1] * groups, *size)
    if groups == 1:
        n, k, y, x = weight.stride()
        _multiply(plan, grad, weight, (k, n, y, x), None, out, fast, flip)
    else:
        _depthwise(plan, grad, weight, None, out, flip)
    return _narrowed(out, dtype)


def _multiply(
    plan: Plan,
    source: Tensor,
    weight: Tensor,
    strides: tuple[int, ...],
    bias: Tensor | None,
    out: Tensor,
    fast: bool,
    flip: bool = False,
) -> None:
    n, k, y, x = strides
    first = weight.data_ptr()
    if flip:  # the kernel turned round: begin at its last tap and step backwards
        first += ((weight.shape[2] - 1) * y + (weight.shape[3] - 1) * x) * weight.element_size()
        y, x = -y, -x
    args = native.Conv(
        *(plan.pointer, source.data_ptr(), first, (n, k, y, x)),
        *(None if bias is None else bias.data_ptr(), out.data_ptr()),
        *(source.shape[1], out.shape[1], DTYPES[weight.dtype], *_how(source)),
    )
    _run("ps_winograd_conv" if fast else "ps_conv", args)


def _taps_first(weight: Tensor) -> Tensor:
    """Return a depthwise weight ``(C, 1, kh, kw)`` as ``(taps, C)``."""
    return weight.flatten(1).t().contiguous()


def _depthwise(plan: Plan, source: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, flip: bool) -> None:
    matrix = _taps_first(weight)
    args = native.Depthwise(
        *(plan.pointer, source.data_ptr(), matrix.data_ptr(), None if bias is None else bias.data_ptr()),
        *(out.data_ptr(), source.shape[1], int(flip), *_how(source)),
    )
    _run("ps_depthwise", args)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed over all active outputs."""
    dtype, (kh, kw) = x.dtype, stencil.kernel
    c_in, c_out = x.shape[1], grad.shape[1]
    fast = winograd(dtype, _size(x), (c_in, c_out), stencil, groups)
    x, grad = (packed_like(t) if fast else _compute(t, groups) for t in (x, grad))
    plan = plan_for(slot, coords, _size(x), stencil, False, lists_of(groups, fast))
    if groups != 1:
        matrix = x.new_empty(kh * kw, c_in)
        args = native.Depthwise(
            *(plan.pointer, x.data_ptr(), matrix.data_ptr(), None, grad.data_ptr()), *(c_in, 0, *_how(x))
        )
        _run("ps_depthwise_wgrad", args)
        return matrix.t().unflatten(1, (1, kh, kw)).to(dtype)
    if c_in < 32 <= c_out:  # few input channels (a stem) would leave the vectors half empty
        strides = (1, c_out, kw * c_in * c_out, c_in * c_out)
    else:
        strides = (kh * kw * c_in, 1, kw * c_in, c_in)
    weight = x.new_empty_strided((c_out, c_in, kh, kw), strides, dtype=dtype)
    args = native.Wgrad(
        *(plan.pointer, x.data_ptr(), grad.data_ptr(), weight.data_ptr(), weight.stride()),
        *(c_in, c_out, DTYPES[dtype], *_how(x)),
    )
    _run("ps_winograd_wgrad" if fast else "ps_wgrad", args)
    return weight


def max_pool2d(x: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Return the maximum over each stencil and the winning tap (uint8, row-major in the kernel)."""
    dtype = x.dtype
    x = _widened(x)
    out = packed_empty(x, x.shape[0], x.shape[1], *stencil.output_size(_size(x)))
    tap = torch.empty_like(out, dtype=torch.uint8)
    plan = plan_for(slot, coords, _size(x), stencil, False)
    _pool("ps_max_pool", plan, x, tap, out)
    return _narrowed(out, dtype), tap


def max_pool2d_grad(grad: Tensor, tap: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil) -> Tensor:
    """Return the gradient at the input ``(N, C, ph, pw)``: each output's gradient goes to its winning tap."""
    dtype = grad.dtype
    grad, tap = _widened(grad), packed_like(tap)
    out = packed_empty(grad, grad.shape[0], grad.shape[1], *size)
    plan = plan_for(slot, coords, _size(grad), stencil, True)
    _pool("ps_max_pool_grad", plan, grad, tap, out)
    return _narrowed(out, dtype)


def _pool(name: str, plan: Plan, source: Tensor, tap: Tensor, out: Tensor) -> None:
    pointer = ctypes.cast(tap.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
    args = native.Pool(*(plan.pointer, source.data_ptr(), pointer, out.data_ptr()), *(source.shape[1], *_how(source)))
    _run(name, args)
