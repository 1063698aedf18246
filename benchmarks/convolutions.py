"""The convolutions that are timed on a GPU: shapes of ResNets and ConvNeXts on 288x288 pixels in patches of 32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import PatchGrid, pack, unpack

__all__ = ["GROUPS", "Problem", "Shape", "dense_and_mask", "problem", "reference"]


class Shape(NamedTuple):
    """A convolution: patch side, input and output channels, kernel, stride, groups."""

    p: int
    c_in: int
    c_out: int
    k: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c_in == self.c_out

    @property
    def out_p(self) -> int:
        """Pixels along a patch of the output."""
        return self.p // self.stride

    def __str__(self) -> str:
        return f"{self.k}x{self.k} s{self.stride} p{self.p} C{self.c_in}-{self.c_out} g{self.groups}"


GROUPS: dict[str, tuple[Shape, ...]] = {
    "3x3": tuple(Shape(p, c, c) for p, c in ((8, 64), (4, 128), (2, 256), (1, 512))),
    "stride2": tuple(Shape(p, c, c, stride=2) for p, c in ((8, 128), (4, 256), (2, 512))),
    "depthwise": tuple(Shape(p, c, c, k=7, groups=c) for p, c in ((8, 96), (4, 192), (2, 384), (1, 768))),
    "stem": (Shape(32, 12, 64, k=7, stride=2),),
}


class Problem(NamedTuple):
    """One convolution of packed patches and a direction for its gradients.

    Attributes:
        shape: what is convolved.
        grid: active patches.
        x: ``(N, C_in, p, p)`` in channels_last memory.
        weight: ``(C_out, C_in / groups, k, k)`` in channels_last memory.
        g: ``(N, C_out, p / stride, p / stride)``.
    """

    shape: Shape
    grid: PatchGrid
    x: Tensor
    weight: Tensor
    g: Tensor

    @property
    def options(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as PyTorch's operators take them."""
        s = self.shape
        return [s.stride] * 2, [s.k // 2] * 2, [1, 1], s.groups

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers rounded to ``dtype``."""
        return Problem(self.shape, self.grid, *(t.to(dtype) for t in (self.x, self.weight, self.g)))


def problem(
    shape: Shape,
    masked: float,
    batch: int,
    dtype: torch.dtype,
    device: str = "cuda",
    side: tuple[int, int] = (9, 9),
) -> Problem:
    """Return random operands on ``side`` patches of ``shape.p`` pixels; outputs are of the size of the inputs."""
    generator = torch.Generator(device).manual_seed(0)
    grid = PatchGrid.random(batch, side, 1 - masked, generator=generator)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device) * scale
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    n, per_group = grid.num_active, shape.c_in // shape.groups
    x = normal(n, shape.c_in, shape.p, shape.p)
    weight = normal(shape.c_out, per_group, shape.k, shape.k, scale=1 / (shape.k * per_group**0.5))
    return Problem(shape, grid, x, weight, normal(n, shape.c_out, shape.out_p, shape.out_p))


def dense_and_mask(p: Problem, x: Tensor, weight: Tensor) -> Tensor:
    """Return the packed output of a convolution of the whole image in which inactive patches are 0."""
    stride, padding, dilation, groups = p.options
    return pack(F.conv2d(unpack(x, p.grid), weight, None, stride, padding, dilation, groups), p.grid)


def reference(p: Problem) -> dict[str, Tensor]:
    """Return output ``y`` and gradients ``x`` and ``w`` by dense-and-mask in float32, without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        x, weight, g = (t.detach().float() for t in (p.x, p.weight, p.g))
        x.requires_grad_()
        weight.requires_grad_()
        y = dense_and_mask(p, x, weight)
        gx, gw = torch.autograd.grad(y, (x, weight), g)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return {"y": y.detach(), "x": gx, "w": gw}
