"""Geometry of a stencil operation on packed patches: what it reads beyond a patch, and whether it is aligned."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch

from .eager import once

__all__ = ["LARGEST", "POINT", "Call", "Pair", "Stencil", "aligned_stencil", "pair", "plain", "whole"]

LARGEST = 2**31 - 1  # engines count pixels and rows in int32
Pair = int | tuple[int, int]


def whole(value: Any, name: str) -> int:
    """Return an int, numpy's too, as an int; raise TypeError naming the argument for all else, also bool and tensor."""
    try:
        if not isinstance(value, (bool, torch.Tensor)):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an int, got {value!r}")


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Return ``(vertical, horizontal)`` from an int or a pair of ints, numpy's too.

    Raises:
        ValueError: naming the argument, if there are not two.
        TypeError: if they are not ints; a bool is none.
    """
    sides: Any = value if hasattr(value, "__len__") and getattr(value, "ndim", 1) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    return whole(sides[0], name), whole(sides[1], name)


def plain(values: Sequence[Any]) -> bool:
    """Return whether all values are ints and pairs of them, spelled as the key of a memo must be.

    A memo takes 1, 1.0 and True for the same, so this is asked before it.
    """
    for value in values:
        if type(value) is tuple and len(value) == 2:
            if type(value[0]) is not int or type(value[1]) is not int:
                return False
        elif type(value) is not int:
            return False
    return True


class Stencil(NamedTuple):
    """Kernel, stride, padding and dilation of a convolution or pooling, each (vertical, horizontal) in pixels."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def before(self) -> tuple[int, int]:
        """Pixels read above and left of a patch."""
        return self.padding

    @property
    def after(self) -> tuple[int, int]:
        """Pixels read below and right of a patch; negative where the last pixels of a patch are not read."""
        v, h = (
            d * (k - 1) - (s - 1) - p
            for k, s, p, d in zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return v, h

    @property
    def before_grad(self) -> tuple[int, int]:
        """Output pixels above and left of a patch that its input gradient reads."""
        v, h = (
            (d * (k - 1) - p) // s
            for k, s, p, d in zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return v, h

    @property
    def after_grad(self) -> tuple[int, int]:
        """Output pixels below and right of a patch that its input gradient reads."""
        v, h = (-(-p // s) for s, p in zip(self.stride, self.padding, strict=True))
        return v, h

    @property
    def taps(self) -> int:
        """Number of positions in the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def local(self) -> bool:
        """Whether no output pixel reads beyond its own patch."""
        return max(self.before) <= 0 and max(self.after) <= 0

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the pixels of a patch after the operation."""
        return size[0] // self.stride[0], size[1] // self.stride[1]

    def check_range(self, name: str) -> None:
        """Raise ValueError for numbers that no operation can have, or that engines cannot count."""
        for k, s, pad, d in zip(self.kernel, self.stride, self.padding, self.dilation, strict=True):
            if min(k, s, d) < 1 or pad < 0 or max(s, pad, d, d * (k - 1) + 1) > LARGEST:
                raise ValueError(
                    f"{name}: kernel {k}, stride {s}, padding {pad} or dilation {d} is out of range; the first, second "
                    f"and last are 1 or more, the padding 0 or more, and all they reach is at most {LARGEST} pixels"
                )

    def check(self, size: tuple[int, int], name: str, ceil_mode: bool = False) -> None:
        """Raise ValueError unless an image of whole patches of ``size`` pixels maps to whole patches.

        With ``reach = dilation * (kernel - 1)``, dense output is ``floor((H + 2 * padding - reach - 1) / stride) + 1``;
        it equals ``H / stride`` if and only if ``reach + 1 - stride <= 2 * padding <= reach``.
        With ``ceil_mode`` the quotient is rounded up and both bounds are lower by ``stride - 1``, unless what is added
        begins beyond image and padding, where PyTorch leaves it out.
        """
        self.check_range(name)
        for axis, (p, k, s, pad, d) in enumerate(
            zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        ):
            side = "height" if axis == 0 else "width"
            if p < 1:
                raise ValueError(f"{name}: the patches have a {side} of {p} pixels; give them one at least")
            if p % s:
                raise ValueError(
                    f"{name}: stride {s} does not divide the patch {side} of {p} pixels; "
                    f"use larger patches or fewer strided layers"
                )
            reach = d * (k - 1)
            most = reach - (s - 1 if ceil_mode and (pad > 0 or reach >= s) else 0)
            least = most + 1 - s
            if not least <= 2 * pad <= most:
                raise ValueError(
                    f"{name}: kernel {k}, stride {s}, padding {pad}, dilation {d}, ceil_mode {ceil_mode} does not map "
                    f"patches to patches; twice the padding must lie in [{max(0, least)}, {most}]"
                )


def aligned_stencil(
    kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, size: Sequence[int], name: str, ceil_mode: bool
) -> Stencil:
    """Return the stencil of a module's arguments; raise ValueError and TypeError as `pair` and `Stencil.check` do."""
    if not plain((stride, padding, dilation)):
        stride, padding, dilation = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    return _aligned(kernel, stride, padding, dilation, size, name, bool(ceil_mode))


@once
def _aligned(
    kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, size: Sequence[int], name: str, ceil_mode: bool
) -> Stencil:
    sides = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"))
    stencil = Stencil((int(kernel[0]), int(kernel[1])), *sides)
    stencil.check((size[0], size[1]), name, ceil_mode)
    return stencil


POINT = Stencil((1, 1))  # of what looks at one pixel alone


class Call(NamedTuple):
    """What an engine needs to know to say whether it takes a call, and what auto dispatch chooses by.

    Attributes:
        operation: what is asked for, such as ``"conv2d"``; a key of ``patchsparse.backends.OPERATIONS``.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the packed tensor.
        num_active: packed rows N; of whole images, their number.
        size: pixels of a patch on the input side.
        in_channels: channels of the input.
        out_channels: channels of the output.
        stencil: kernel, stride, padding and dilation; ``POINT`` where no neighbour is read.
        groups: of a convolution.
        plain: whether the call is eager, on a plain tensor and outside autocast.
    """

    operation: str
    device: str
    dtype: torch.dtype
    num_active: int
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    stencil: Stencil
    groups: int = 1
    plain: bool = True
