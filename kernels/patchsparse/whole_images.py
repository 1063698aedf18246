"""Convolution of whole images: by PyTorch, or by an engine of packed patches, to which an image is a single patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import choose, gather
from .functional import patch_conv2d, patch_conv_transpose2d
from .geometry import POINT, Call, Stencil, whole
from .grid import PatchGrid, whole_grid
from .ops.calls import call_on, is_plain
from .pointwise import local_conv2d

__all__ = [
    "THREE",
    "conv2d_call",
    "conv_transpose2d_call",
    "grid_call",
    "image_conv2d",
    "image_conv_transpose2d",
    "image_engine",
    "image_grid",
]

THREE = Stencil((3, 3), (1, 1), (1, 1))


def image_engine(image: Tensor, out_channels: int, backend: str = "auto") -> bool:
    """Return whether `image_conv2d` of ``image`` ``(B, C, H, W)`` by a 3x3 kernel runs by the ``cpp`` engine.

    It does where that engine has Winograd's method for it, which neither ``F.conv2d`` nor another engine has:
    float32 or float64 on a CPU, even sides, 32 channels and more. Everything else is left to PyTorch: other engines,
    autocast, ``torch.compile`` and subclasses of Tensor.

    Raises:
        ValueError: for an unknown backend, or if ``image`` is not four-dimensional.
        TypeError: if ``out_channels`` is not an int.
        RuntimeError: if a named backend cannot run here, with its reason.
    """
    _check_image(image)
    return choose(conv2d_call(image, whole(out_channels, "out_channels"), THREE.kernel), backend) == "cpp"


def image_grid(image: Tensor, backend: str = "auto") -> PatchGrid | None:
    """Return the grid to bind for whole images ``(B, C, H, W)`` in a sparsified module: each is a single patch.

    None, which is the plain dense module, where `image_conv_transpose2d` would leave them to PyTorch. Raises as
    `image_engine` does. Equivalent to::

        grid = PatchGrid.from_active(torch.ones(B, 1, 1, dtype=torch.bool))
    """
    _check_image(image)
    return whole_grid(image.shape[0]) if choose(grid_call(image), backend) == "cpp" else None


def image_conv2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Convolve whole images, 3x3 with padding 1 or 1x1: ``F.conv2d(image, weight, bias, padding=k // 2)``, or faster.

    A 1x1 convolution is the matrix product of `patchsparse.pointwise.local_conv2d`, where oneDNN would go through few
    pixels image by image.

    Args:
        image: ``(B, C_in, H, W)``, any float dtype.
        weight: ``(C_out, C_in, k, k)`` of the same dtype, k odd; an engine takes 1 and 3.
        bias: ``(C_out,)`` or None.
        backend: ``"auto"`` and ``"cpp"`` may take that engine, see `image_engine`; any other is left to PyTorch.

    Returns:
        ``(B, C_out, H, W)``; in channels_last memory if the engine computed it.

    Raises:
        ValueError: if shapes or devices disagree, for an even kernel or an unknown backend.
        TypeError: if dtypes disagree.
        RuntimeError: if a named backend cannot run here, with its reason.
    """
    _check_operands(image, weight, bias, 1)
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"image_conv2d keeps the size of images, which an even kernel cannot: {tuple(weight.shape)}")
    if weight.shape[2:] == (1, 1) and image_grid(image, backend) is not None:
        return local_conv2d(image.contiguous(memory_format=torch.channels_last), weight, bias, POINT, 1, backend)
    if choose(conv2d_call(image, weight.shape[0], weight.shape[2:]), backend) == "cpp":
        return patch_conv2d(image, weight, bias, whole_grid(image.shape[0]), padding=1, backend="cpp")
    return gather.image_conv2d(image, weight, bias)


def image_conv_transpose2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Enlarge whole images twofold: ``F.conv_transpose2d(image, weight, bias, 2, padding=1)``, faster where it can be.

    Args:
        image: ``(B, C_in, H, W)``, any float dtype.
        weight: ``(C_in, C_out, 4, 4)`` of the same dtype.
        bias: ``(C_out,)`` or None.
        backend: ``"auto"`` and ``"cpp"`` take that engine under the conditions of `image_engine`, sides and channels
            aside; any other is left to PyTorch.

    Returns:
        ``(B, C_out, 2 H, 2 W)``; in channels_last memory if the engine computed it.

    Raises:
        ValueError: if shapes or devices disagree, for another kernel than 4x4 or an unknown backend.
        TypeError: if dtypes disagree.
        RuntimeError: if a named backend cannot run here, with its reason.
    """
    _check_operands(image, weight, bias, 0)
    if weight.shape[2:] != (4, 4):
        raise ValueError(f"image_conv_transpose2d enlarges twofold by a 4x4 kernel, got weight {tuple(weight.shape)}")
    if choose(conv_transpose2d_call(image, weight), backend) == "cpp":
        grid = whole_grid(image.shape[0])
        return patch_conv_transpose2d(image, weight, bias, grid, stride=2, padding=1, backend="cpp")
    return gather.image_conv_transpose2d(image, weight, bias)


def _check_operands(image: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> None:
    """Raise unless ``weight`` takes ``image`` ``(B, C_in, H, W)``, C_in being its size along ``axis``, and a bias."""
    _check_image(image)
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[axis] != image.shape[1] or 0 in weight.shape:
        found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight {found} does not take images {tuple(image.shape)}; C_in must be {image.shape[1]}")
    if bias is not None and bias.shape != (weight.shape[1 - axis],):
        raise ValueError(f"bias must be ({weight.shape[1 - axis]},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.device != image.device or x.layout is not torch.strided):
            raise ValueError(
                f"images are on {image.device} and {name} on {x.device}, {x.layout}; bring both to one device, strided"
            )
        if x is not None and x.dtype != image.dtype and not torch.is_autocast_enabled(image.device.type):
            raise TypeError(f"images are {image.dtype} and {name} {x.dtype}; cast one, or use torch.autocast")


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.dim() != 4 or image.layout is not torch.strided:
        found = f"{tuple(image.shape)} {image.layout}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image must be (B, C, H, W) and strided, got {found}")


def conv2d_call(image: Tensor, out_channels: int, kernel: Sequence[int]) -> Call:
    """Return the call of :func:`image_conv2d` by a ``kernel`` of that many pixels."""
    height, width = kernel
    return _call("image_conv2d", image, out_channels, Stencil((height, width), (1, 1), (height // 2, width // 2)))


def conv_transpose2d_call(image: Tensor, weight: Tensor) -> Call:
    """Return the call of :func:`image_conv_transpose2d`."""
    stencil = Stencil((weight.shape[2], weight.shape[3]), (2, 2), (1, 1))
    return _call("image_conv_transpose2d", image, weight.shape[1], stencil)


def grid_call(image: Tensor) -> Call:
    """Return the call of :func:`image_grid`."""
    return _call("image_grid", image, image.shape[1], POINT)


def _call(operation: str, image: Tensor, out_channels: int, stencil: Stencil) -> Call:
    return call_on(operation, image, image.shape[2:], (image.shape[1], out_channels), stencil, 1, is_plain(image))
