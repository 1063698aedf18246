"""Operations whose stencil never leaves its patch: they need no grid, and PyTorch has them itself."""

from __future__ import annotations

from torch import Tensor

from .backends import choose, gather
from .geometry import POINT, Call, Stencil
from .grid import whole_grid
from .ops import conv as ops
from .ops.calls import call_on, is_plain

__all__ = ["conv_call", "linear_call", "local_conv2d", "local_linear", "local_pool_call"]


def local_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stencil: Stencil, groups: int, backend: str = "auto"
) -> Tensor:
    """Convolve ``(N, C_in, ph, pw)`` without a halo; ``(N, C_out, ph / stride, pw / stride)`` in channels_last memory.

    ``backend`` is as in `patchsparse.patch_conv2d`. Equivalent to::

        y = F.conv2d(x, weight, bias, stencil.stride, 0, stencil.dilation, groups)
    """
    call = conv_call(x, weight, stencil, groups)
    if choose(call, backend) == "cpp":
        grid = whole_grid(x.shape[0])
        return ops.conv2d(x, weight, bias, grid.slot, grid.coords, stencil.stride, (0, 0), (1, 1), 1, "cpp")
    if call.operation == "product":
        return gather.product(x, weight, bias, stencil)
    return gather.local_conv2d(x, weight, bias, stencil, groups)


def local_linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "auto") -> Tensor:
    """Multiply each row of ``(N, ph, pw, C_in)``, channels last, by ``weight`` ``(C_out, C_in)``: a 1x1 convolution.

    ``backend`` is as in `patchsparse.patch_conv2d`. Equivalent to::

        y = F.linear(x, weight, bias)
    """
    if choose(linear_call(x, weight), backend) == "cpp":
        packed, square = x.permute(0, 3, 1, 2), weight[:, :, None, None]
        return local_conv2d(packed, square, bias, POINT, 1, "cpp").permute(0, 2, 3, 1)
    return gather.linear(x, weight, bias)


def conv_call(x: Tensor, weight: Tensor, stencil: Stencil, groups: int) -> Call:
    """Return the call of :func:`local_conv2d`: on a CPU a product of matrices, unless it has groups or gaps.

    A GPU keeps ``F.conv2d``: its float32 precision is not set by that of products.
    """
    size, channels = x.shape[2:], (x.shape[1], weight.shape[0])
    if groups == 1 and stencil.dilation == (1, 1) and x.device.type == "cpu":
        return call_on("product", x, size, channels, stencil, 1, is_plain(x))
    return call_on("local_conv2d", x, size, channels, stencil, groups)


def linear_call(x: Tensor, weight: Tensor) -> Call:
    """Return the call of :func:`local_linear`."""
    return call_on("product", x, x.shape[1:3], (x.shape[3], weight.shape[0]), POINT, 1, is_plain(x))


def local_pool_call(operation: str, x: Tensor, stencil: Stencil) -> Call:
    """Return the call of a pooling of ``(N, C, ph, pw)`` without a halo."""
    return call_on(operation, x, x.shape[2:], (x.shape[1], x.shape[1]), stencil, x.shape[1])
