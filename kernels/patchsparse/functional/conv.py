"""The front door of convolution on packed patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..eager import once
from ..geometry import LARGEST, Pair, Stencil, aligned_stencil, pair, plain, whole
from ..grid import PatchGrid
from ..ops import conv as ops
from ..packing import check_packed
from ..pointwise import local_conv2d

__all__ = [
    "autocast",
    "conv2d_stencil",
    "enlarging_stencil",
    "patch_conv2d",
    "patch_conv_transpose2d",
    "transposed_stencil",
]


def patch_conv2d(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: PatchGrid,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve packed patches, reading active neighbours through the grid.

    Args:
        packed: ``(N, C_in, ph, pw)`` float64, float32, bfloat16 or float16.
        weight: ``(C_out, C_in / groups, kh, kw)`` of the same dtype (autocast casts both).
        bias: ``(C_out,)`` or None.
        grid: N active patches.
        stride: pixels; must divide the patch.
        padding: pixels; the output must be ``1 / stride`` of the image ("same" padding for odd kernels).
        dilation: pixels between taps.
        groups: as in ``F.conv2d``.
        backend: ``"auto"`` or the name of an engine; see `patchsparse.explain`.

    Returns:
        ``(N, C_out, ph / stride, pw / stride)`` in channels_last memory.

    Raises:
        ValueError: if shapes or devices disagree, numbers are out of range, the stencil does not map patches to
            patches, or the backend is unknown.
        TypeError: if dtypes disagree or are no float ones, or a number is not an int.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        dense = F.conv2d(unpack(packed, grid), weight, bias, stride, padding, dilation, groups)
        y = pack(dense, grid)
    """
    packed, weight, bias = autocast(packed, weight, bias)
    stencil = conv2d_stencil(packed, weight, bias, grid, stride, padding, dilation, groups)
    if stencil.local:
        return local_conv2d(packed, weight, bias, stencil, groups, backend)
    options = (stencil.stride, stencil.padding, stencil.dilation, groups, backend)
    return ops.conv2d(packed, weight, bias, grid.slot, grid.coords, *options)


def patch_conv_transpose2d(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: PatchGrid,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve packed patches transposed, which enlarges each patch by the stride.

    Args:
        packed: ``(N, C_in, ph, pw)``.
        weight: ``(C_in, C_out / groups, kh, kw)``.
        bias: ``(C_out,)`` or None.
        grid: N active patches.
        stride: pixels; the output must be ``stride`` times the image, that is
            ``dilation * (kernel - 1) + 1 + output_padding - 2 * padding = stride``.
        padding: pixels, as in ``F.conv_transpose2d``.
        output_padding: pixels, likewise; less than the stride or the dilation.
        groups: likewise.
        dilation: pixels between taps.
        backend: ``"auto"`` or the name of an engine.

    Returns:
        ``(N, C_out, ph * stride, pw * stride)`` in channels_last memory.

    Raises:
        ValueError: if shapes or devices disagree, numbers are out of range, the output is not ``stride`` times the
            image, or the backend is unknown.
        TypeError: if dtypes disagree or are no float ones, or a number is not an int.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        x = unpack(packed, grid)
        y = pack(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation), grid)
    """
    packed, weight, bias = autocast(packed, weight, bias)
    stencil = transposed_stencil(packed, weight, bias, grid, stride, padding, output_padding, groups, dilation)
    options = (stencil.stride, stencil.padding, stencil.dilation, groups, backend)
    out = ops.conv2d_dgrad(packed, weight, grid.slot, grid.coords, *options)
    return out if bias is None else out + bias[:, None, None]


def conv2d_stencil(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: PatchGrid,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Stencil:
    """Check the arguments of :func:`patch_conv2d` and return the stencil."""
    check_packed(packed, grid)
    _check_weight(packed, weight, bias, groups, 1)
    return aligned_stencil(weight.shape[2:], stride, padding, dilation, packed.shape[2:], "patch_conv2d", False)


def transposed_stencil(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: PatchGrid,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> Stencil:
    """Check the arguments of :func:`patch_conv_transpose2d` and return the stencil."""
    check_packed(packed, grid)
    _check_weight(packed, weight, bias, groups, 0)
    if not plain((stride, padding, output_padding, dilation)):
        stride, padding, dilation = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
        output_padding = pair(output_padding, "output_padding")
    return enlarging_stencil(weight.shape[2:], stride, padding, output_padding, dilation, packed.shape[2:])


@once
def enlarging_stencil(
    kernel: Sequence[int],
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    size: Sequence[int],
) -> Stencil:
    """Return the stencil of a transposed convolution whose image is ``stride`` times the input; raise ValueError."""
    name = "patch_conv_transpose2d"
    sides = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"))
    stencil, extra = Stencil((int(kernel[0]), int(kernel[1])), *sides), pair(output_padding, "output_padding")
    stencil.check_range(name)
    if min(size) < 1 or max(s * n for s, n in zip(stencil.stride, size, strict=True)) > LARGEST:
        raise ValueError(f"{name}: patches of {size[0]}x{size[1]} pixels cannot be enlarged by {stencil.stride}")
    for k, s, p, d, e in zip(stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, extra, strict=True):
        if not 0 <= e < max(s, d):
            raise ValueError(f"{name}: output_padding {e} must be 0 or more, and less than stride {s} or dilation {d}")
        if d * (k - 1) + 1 + e - 2 * p != s:
            raise ValueError(
                f"patch_conv_transpose2d: kernel {k}, stride {s}, padding {p}, output_padding {e}, dilation {d} gives "
                f"an image that is not {s} times the input; choose dilation * (kernel - 1) + 1 + output_padding - "
                f"2 * padding = stride"
            )
    return stencil


def autocast(packed: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast float32 and half operands to the autocast dtype, as ``F.conv2d`` does; without autocast return them.

    On a GPU weights ``(C_out, C_in, kh, kw)`` are laid out as kernels read them by the same copy.
    """
    device = packed.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return packed, weight, bias
    dtype = torch.get_autocast_dtype(device)
    layout = torch.channels_last if device == "cuda" and weight.dim() == 4 else torch.preserve_format

    def cast(x: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
        return x if x.dtype == dtype or x.dtype == torch.float64 else x.to(dtype, memory_format=layout)

    return cast(packed), cast(weight, layout), None if bias is None else cast(bias)


def _check_weight(packed: Tensor, weight: Tensor, bias: Tensor | None, groups: int, axis: int) -> None:
    """Raise unless ``weight`` takes ``packed``, whose channels are its first axis or, by groups, its second."""
    if type(groups) is not int:
        groups = whole(groups, "groups")
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(f"weight and bias must be tensors, got {type(weight).__name__} and {type(bias).__name__}")
    shape, channels = weight.shape, packed.shape[1]
    if len(shape) != 4 or groups < 1 or 0 in shape or channels < 1:
        raise ValueError(
            f"weight {tuple(shape)} with groups={groups} takes no packed {tuple(packed.shape)}; it must be "
            "four-dimensional with one channel and one tap or more, and groups 1 or more"
        )
    one, many = shape[0], shape[1] * groups
    expected, out = (one, many) if axis == 0 else (many, one)
    if channels != expected or channels % groups or out % groups:
        raise ValueError(
            f"weight {tuple(shape)} with groups={groups} takes {expected} input channels, "
            f"packed {tuple(packed.shape)} has {channels}"
        )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must be ({out},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if x.dtype != packed.dtype:
            raise TypeError(f"packed is {packed.dtype} and {name} {x.dtype}; cast one, or use torch.autocast")
        if x.device != packed.device or x.layout is not torch.strided:
            raise ValueError(
                f"packed is on {packed.device} and {name} on {x.device}, {x.layout}; bring both to one device, strided"
            )
