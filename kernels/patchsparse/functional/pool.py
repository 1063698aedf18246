"""The front door of pooling on packed patches."""

from __future__ import annotations

from torch import Tensor

from ..backends import choose, gather
from ..geometry import LARGEST, Pair, Stencil, aligned_stencil, pair, whole
from ..grid import PatchGrid
from ..ops import pool as ops
from ..packing import check_packed
from ..pointwise import local_pool_call

__all__ = ["avg_pool2d_stencil", "max_pool2d_stencil", "patch_avg_pool2d", "patch_max_pool2d"]


def patch_max_pool2d(
    packed: Tensor,
    grid: PatchGrid,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Take the maximum over each stencil; an inactive neighbour counts as 0, the image border as -inf.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        kernel_size: pixels; at most 255 taps.
        stride: pixels; None is the kernel size. It must divide the patch.
        padding: pixels of -inf around the image.
        dilation: pixels between taps.
        ceil_mode: as in ``F.max_pool2d``.
        backend: ``"auto"`` or the name of an engine.

    Returns:
        ``(N, C, ph / stride, pw / stride)`` in channels_last memory.

    Raises:
        ValueError: if the stencil does not map patches to patches, a number is out of range, or the backend is unknown.
        TypeError: if ``packed`` is of no float dtype, or a number is not an int.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        y = pack(F.max_pool2d(unpack(packed, grid), kernel_size, stride, padding, dilation, ceil_mode), grid)
    """
    stencil = max_pool2d_stencil(packed, grid, kernel_size, stride, padding, dilation, ceil_mode)
    if stencil.local:
        choose(local_pool_call("local_max_pool2d", packed, stencil), backend)
        return gather.local_max_pool2d(packed, stencil)
    return ops.max_pool2d(packed, grid.slot, grid.coords, *stencil, backend)[0]


def patch_avg_pool2d(
    packed: Tensor,
    grid: PatchGrid,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Average over each stencil; an inactive neighbour counts as a pixel of value 0.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        kernel_size: pixels.
        stride: pixels; None is the kernel size. It must divide the patch.
        padding: pixels around the image.
        ceil_mode: taken where it changes nothing.
        count_include_pad: whether pixels of the padding count; those of inactive patches always do.
        divisor_override: what the sum is divided by; None is the number of pixels.
        backend: ``"auto"`` or the name of an engine; the body in ``gather`` serves for all, as no other has one.

    Returns:
        ``(N, C, ph / stride, pw / stride)`` in channels_last memory.

    Raises:
        ValueError: if the stencil does not map patches to patches, a number is out of range, or the backend is unknown.
        TypeError: if ``packed`` is of no float dtype, or a number is not an int.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        dense = F.avg_pool2d(unpack(packed, grid), kernel_size, stride, padding, False, count_include_pad, divisor)
        y = pack(dense, grid)
    """
    stencil = avg_pool2d_stencil(packed, grid, kernel_size, stride, padding, ceil_mode)
    divisor = stencil.taps if divisor_override is None else whole(divisor_override, "divisor_override")
    if not 0 < divisor <= LARGEST:
        raise ValueError(f"divisor_override must be None or a positive int32, got {divisor_override}")
    if stencil.local:
        choose(local_pool_call("local_avg_pool2d", packed, stencil), backend)
        return gather.local_avg_pool2d(packed, stencil, divisor)
    options = (divisor, count_include_pad or divisor_override is not None, backend)
    return ops.avg_pool2d(packed, grid.slot, grid.coords, *stencil[:3], *options)


def max_pool2d_stencil(
    packed: Tensor,
    grid: PatchGrid,
    kernel_size: Pair,
    stride: Pair | None,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Stencil:
    """Check the arguments of :func:`patch_max_pool2d` and return the stencil."""
    check_packed(packed, grid)
    stencil = _stencil(packed, kernel_size, stride, padding, dilation, "patch_max_pool2d", ceil_mode)
    if stencil.taps > 255:
        raise ValueError(
            f"patch_max_pool2d: kernel_size {stencil.kernel} has {stencil.taps} taps; at most 255 are supported"
        )
    return stencil


def avg_pool2d_stencil(
    packed: Tensor, grid: PatchGrid, kernel_size: Pair, stride: Pair | None, padding: Pair, ceil_mode: bool
) -> Stencil:
    """Check the arguments of :func:`patch_avg_pool2d` and return the stencil."""
    check_packed(packed, grid)
    if ceil_mode:  # must map patches to patches both ways: then the last stencil is the same
        _stencil(packed, kernel_size, stride, padding, 1, "patch_avg_pool2d", True)
    return _stencil(packed, kernel_size, stride, padding, 1, "patch_avg_pool2d", False)


def _stencil(
    packed: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair, name: str, ceil_mode: bool
) -> Stencil:
    kernel = pair(kernel_size, "kernel_size")
    strides = kernel if stride is None else stride
    return aligned_stencil(kernel, strides, padding, dilation, packed.shape[2:], name, ceil_mode)
