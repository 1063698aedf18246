"""The front door: neighbourhood operations on packed patches, with SparK's dense-and-mask meaning.

An inactive neighbour reads as 0 and the image border as the padding; an output pixel is active if and only if its
patch is. Pointwise operations (normalisation, activation) need no function of their own: PyTorch's run on a packed
tensor unchanged, as 1x1 convolutions do, which are faster as a product of matrices here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import ENGINES, OVERRIDE, choose, order, why_not
from .backends.tables import OUTSIDE, tap_rows
from .geometry import Call, Stencil, pair
from .grid import PatchGrid
from .ops import conv as ops
from .packing import check_packed
from .pointwise import is_product, local_conv2d, multiplies_by_engine

__all__ = [
    "available_backends",
    "explain",
    "patch_avg_pool2d",
    "patch_conv2d",
    "patch_conv_transpose2d",
    "patch_max_pool2d",
    "why_unavailable",
]

Pair = int | tuple[int, int]


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
        backend: ``"auto"`` or the name of an engine; see :func:`explain`.

    Returns:
        ``(N, C_out, ph / stride, pw / stride)`` in channels_last memory.

    Raises:
        ValueError: if shapes disagree, or the stencil does not map patches to patches.
        TypeError: if dtypes disagree.
        RuntimeError: if a named backend cannot run, with its reason.

    Equivalent to::

        dense = F.conv2d(unpack(packed, grid), weight, bias, stride, padding, dilation, groups)
        y = pack(dense, grid)
    """
    check_packed(packed, grid)
    packed, weight, bias = _autocast(packed, weight, bias)
    stencil = _stencil(weight, stride, padding, dilation)
    _check_weight(packed, weight, bias, packed.shape[1], weight.shape[1] * groups, weight.shape[0], groups)
    stencil.check((packed.shape[2], packed.shape[3]), "patch_conv2d")
    if stencil.local:
        return local_conv2d(packed, weight, bias, stencil, groups)
    grid_maps, options = (
        (grid.slot, grid.coords),
        (stencil.stride, stencil.padding, stencil.dilation, groups, backend),
    )
    return ops.conv2d(packed, weight, bias, *grid_maps, *options)


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
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose2d``; the output must be ``stride``
            times the image, that is ``dilation * (kernel - 1) + 1 + output_padding - 2 * padding = stride``.
        backend: ``"auto"`` or the name of an engine.

    Returns:
        ``(N, C_out, ph * stride, pw * stride)`` in channels_last memory.

    Raises:
        ValueError: if shapes disagree, or the output is not ``stride`` times the image.

    Equivalent to::

        x = unpack(packed, grid)
        y = pack(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation), grid)
    """
    check_packed(packed, grid)
    packed, weight, bias = _autocast(packed, weight, bias)
    stencil, extra = _stencil(weight, stride, padding, dilation), pair(output_padding, "output_padding")
    _check_weight(packed, weight, bias, packed.shape[1], weight.shape[0], weight.shape[1] * groups, groups)
    for k, s, p, d, e in zip(stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, extra, strict=True):
        if d * (k - 1) + 1 + e - 2 * p != s:
            raise ValueError(
                f"patch_conv_transpose2d: kernel {k}, stride {s}, padding {p}, output_padding {e}, dilation {d} gives "
                f"an image that is not {s} times the input; choose dilation * (kernel - 1) + 1 + output_padding - "
                f"2 * padding = stride"
            )
    options = (stencil.stride, stencil.padding, stencil.dilation, groups, backend)
    out = ops.conv2d_dgrad(packed, weight, grid.slot, grid.coords, *options)
    return out if bias is None else out + bias[:, None, None]


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
    """Take the maximum over windows; an inactive neighbour counts as 0, the image border as -inf.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        kernel_size, stride, padding, dilation, ceil_mode: as in ``F.max_pool2d``; at most 255 taps.
        backend: ``"auto"`` or the name of an engine.

    Returns:
        ``(N, C, ph / stride, pw / stride)`` in channels_last memory.

    Raises:
        ValueError: if the stencil does not map patches to patches.

    Equivalent to::

        y = pack(F.max_pool2d(unpack(packed, grid), kernel_size, stride, padding, dilation, ceil_mode), grid)
    """
    check_packed(packed, grid)
    kernel = pair(kernel_size, "kernel_size")
    stencil = Stencil(
        kernel,
        pair(kernel if stride is None else stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
    )
    stencil.check((packed.shape[2], packed.shape[3]), "patch_max_pool2d", ceil_mode)
    if stencil.taps > 255:
        raise ValueError(f"patch_max_pool2d: kernel_size {kernel} has {stencil.taps} taps; at most 255 are supported")
    if stencil.local:
        return F.max_pool2d(packed, kernel, stencil.stride, 0, stencil.dilation)
    options = (stencil.kernel, stencil.stride, stencil.padding, stencil.dilation, backend)
    return ops.max_pool2d(packed, grid.slot, grid.coords, *options)[0]


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
    """Average over windows; an inactive neighbour counts as a pixel of value 0.

    Args:
        packed: ``(N, C, ph, pw)``.
        grid: N active patches.
        kernel_size, stride, padding, count_include_pad, divisor_override: as in ``F.avg_pool2d``.
        ceil_mode: accepted where it changes nothing.
        backend: accepted for symmetry; the halo is gathered in PyTorch by every engine.

    Returns:
        ``(N, C, ph / stride, pw / stride)`` in channels_last memory.

    Raises:
        ValueError: if the stencil does not map patches to patches.

    Equivalent to::

        dense = F.avg_pool2d(unpack(packed, grid), kernel_size, stride, padding, False, count_include_pad, divisor)
        y = pack(dense, grid)
    """
    check_packed(packed, grid)
    kernel = pair(kernel_size, "kernel_size")
    stencil = Stencil(kernel, pair(kernel if stride is None else stride, "stride"), pair(padding, "padding"))
    size = (packed.shape[2], packed.shape[3])
    stencil.check(size, "patch_avg_pool2d")
    divisor = divisor_override or stencil.taps
    if stencil.local:
        return F.avg_pool2d(packed, kernel, stencil.stride, 0, divisor_override=divisor)
    tile = ops.halo(packed, grid.slot, grid.coords, *_clip(stencil))
    tile = tile[:, :, : tile.shape[2] + min(0, stencil.after[0]), : tile.shape[3] + min(0, stencil.after[1])]
    if count_include_pad or divisor_override is not None:
        return F.avg_pool2d(tile, kernel, stencil.stride, 0, divisor_override=divisor)
    inside = (tap_rows(grid.slot, grid.coords, size, stencil) != OUTSIDE).sum(1)
    out_height, out_width = stencil.output_size(size)
    pixels = inside.view(-1, 1, out_height, out_width).to(packed.dtype)
    return F.avg_pool2d(tile, kernel, stencil.stride, 0, divisor_override=1) / pixels


def available_backends() -> tuple[str, ...]:
    """Return the names of the engines that can run here: a 3x3 float32 convolution on the CPU or the GPU, if any."""
    return tuple(name for name in ENGINES if why_unavailable(name) is None)


def why_unavailable(backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why an engine cannot run a 3x3 convolution on the CPU, nor on the GPU if there is one; None if it can.

    Raises:
        ValueError: for an unknown name.
    """
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    stencil = Stencil((3, 3), padding=(1, 1))
    reasons = [why_not(backend, Call("conv2d", device, dtype, 1, (8, 8), 64, 64, stencil)) for device in devices]
    return None if None in reasons else reasons[0]


def explain(
    packed: Tensor,
    weight: Tensor,
    grid: PatchGrid,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    backend: str = "auto",
) -> str:
    """Return which engine :func:`patch_conv2d` would take for these arguments, and why not the others.

    Takes the arguments of :func:`patch_conv2d` without the bias; nothing is computed.
    """
    from .backends import cpp, gather

    check_packed(packed, grid)
    stencil = _stencil(weight, stride, padding, dilation)
    size = (packed.shape[2], packed.shape[3])
    stencil.check(size, "patch_conv2d")
    call = Call(
        "conv2d",
        packed.device.type,
        packed.dtype,
        grid.num_active,
        size,
        packed.shape[1],
        weight.shape[0],
        stencil,
        groups,
    )
    what = (
        f"conv2d {stencil.kernel[0]}x{stencil.kernel[1]} stride {stencil.stride} on {tuple(packed.shape)} "
        f"{packed.dtype} {call.device}, {grid.num_active} of {grid.active.numel()} patches active"
    )
    if stencil.local:
        if not is_product(call.device, stencil, groups):
            how = "no engine: PyTorch's conv2d"
        else:
            how = f"one product of matrices by {'the cpp engine' if multiplies_by_engine(packed) else 'PyTorch'}"
        return f"{what}\n  the stencil never leaves its patch, so {how} serves on the packed tensor"
    taken = choose(call, backend)
    lines = [what]
    for name in ENGINES:
        reason = why_not(name, call)
        if name == taken and name == "gather":
            chosen_method = gather.method(packed, call.in_channels, call.out_channels, stencil, groups)
            lines.append(f"  gather: taken, method {chosen_method}")
        elif name == taken == "cpp" and cpp.winograd(
            call.dtype, size, (call.in_channels, call.out_channels), stencil, groups
        ):
            lines.append("  cpp: taken, Winograd's F(2x2, 3x3)")
        elif name == taken:
            lines.append(f"  {name}: taken")
        elif reason is not None:
            lines.append(f"  {name}: cannot run, {reason}")
        else:
            lines.append(f"  {name}: can run; {'slower here by measurement' if backend == 'auto' else 'not asked for'}")
    lines.append(f"  order for auto: {', '.join(order(call))}; {OVERRIDE} overrides")
    return "\n".join(lines)


def _stencil(weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Stencil:
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    return Stencil(kernel, pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"))


def _clip(stencil: Stencil) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the halo widths with negative ones as 0."""
    return stencil.before, (max(0, stencil.after[0]), max(0, stencil.after[1]))


def _autocast(packed: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast float32 and half operands to the autocast dtype, as ``F.conv2d`` does."""
    device = packed.device.type
    if not torch.is_autocast_enabled(device):
        return packed, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    return cast(packed), cast(weight), None if bias is None else cast(bias)


def _check_weight(
    packed: Tensor, weight: Tensor, bias: Tensor | None, channels: int, expected: int, out: int, groups: int
) -> None:
    if weight.dim() != 4 or channels != expected or groups < 1 or channels % groups or out % groups:
        raise ValueError(
            f"weight {tuple(weight.shape)} with groups={groups} takes {expected} input channels, "
            f"packed {tuple(packed.shape)} has {channels}"
        )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must be ({out},), got {tuple(bias.shape)}")
    if weight.dtype != packed.dtype or (bias is not None and bias.dtype != packed.dtype):
        raise TypeError(f"packed is {packed.dtype} and weight {weight.dtype}; cast one, or use torch.autocast")
