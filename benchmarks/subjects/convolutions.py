"""The convolutions that are timed: shapes of ResNets and ConvNeXts on 288x288 pixels in patches of 32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsparse import PatchGrid, onednn, pack, unpack
from patchsparse.geometry import Stencil
from patchsparse.precision import exact_float32

from ..measure.work import Work, count_pairs

__all__ = [
    "GROUPS",
    "LIMITS",
    "RESULTS",
    "SIDES",
    "Problem",
    "Run",
    "Shape",
    "dense_and_mask",
    "fresh",
    "operators",
    "problem",
    "reference",
]

SIDES = ("fwd", "dgrad", "wgrad")
RESULTS: dict[str, str] = {"fwd": "y", "dgrad": "x", "wgrad": "w"}  # of each side, as `reference` names them
# Relative error against dense-and-mask in float32 up to which a result counts as the same.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
Run = Callable[[], list[Tensor]]


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
        """Whether each channel is convolved alone."""
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

    @property
    def pairs(self) -> int:
        """How many (active output pixel, active input pixel) pairs a kernel meets."""
        s = self.shape
        stencil = Stencil((s.k, s.k), (s.stride, s.stride), (s.k // 2, s.k // 2))
        return count_pairs(self.grid.slot, self.grid.coords, (s.p, s.p), stencil)

    @property
    def limit(self) -> float:
        """How many times fewer products the active pairs have than whole images: no direct convolution gains more."""
        (rows, columns), s = self.grid.shape, self.shape
        return self.grid.batch_size * rows * columns * (s.out_p * s.k) ** 2 / self.pairs

    def work(self, passes: Sequence[str] = SIDES) -> Work:
        """Return the work of some passes on packed patches; each has as many products as the others."""
        macs = self.pairs * self.weight.numel() / (self.shape.k**2)
        moved = sum(t.nbytes for t in (self.x, self.weight, self.g))
        return Work(macs * len(passes), float(moved) * len(passes))

    def again(self, seed: int) -> Problem:
        """Return the same problem with other operands of the same sizes, and the same weight."""
        generator = torch.Generator(self.x.device).manual_seed(seed)

        def like(t: Tensor) -> Tensor:
            values = torch.randn(t.shape, generator=generator, device=t.device)
            return values.to(t.dtype).contiguous(memory_format=torch.channels_last)

        return self._replace(x=like(self.x), g=like(self.g))

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers rounded to ``dtype``."""
        return Problem(self.shape, self.grid, *(t.to(dtype) for t in (self.x, self.weight, self.g)))


def fresh(grid: PatchGrid) -> PatchGrid:
    """Return the same mask as one that was never met: whatever engines keep with a grid is built again."""
    return PatchGrid(grid.active, grid.coords.clone(), grid.slot.clone())


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
    return pack(onednn.conv2d(unpack(x, p.grid), weight, None, stride, padding, dilation, groups), p.grid)


def reference(p: Problem) -> dict[str, Tensor]:
    """Return output ``y`` and gradients ``x`` and ``w`` by dense-and-mask in float32, without TF32."""
    with exact_float32():
        x, weight, g = (t.detach().float() for t in (p.x, p.weight, p.g))
        x.requires_grad_()
        weight.requires_grad_()
        y = dense_and_mask(p, x, weight)
        gx, gw = torch.autograd.grad(y, (x, weight), g)
    return {"y": y.detach(), "x": gx, "w": gw}


def operators(p: Problem, backend: str) -> dict[str, Run]:
    """Return the passes of a problem as bare operators: an engine's, or those of ``"dense"`` convolution of images.

    Plain dense convolves random values everywhere: it gets its masking for free, and no zeros that save power.
    """
    stride, padding, dilation, groups = p.options
    if backend == "dense":
        x, g = (_image(t, p) for t in (p.x, p.g))

        def backward(wanted: list[bool]) -> list[Tensor]:
            found = torch.ops.aten.convolution_backward(
                g, x, p.weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
            )
            return [t for t in found if t is not None]

        return {
            "fwd": lambda: [F.conv2d(x, p.weight, None, stride, padding, dilation, groups)],
            "dgrad": lambda: backward([True, False, False]),
            "wgrad": lambda: backward([False, True, False]),
        }
    op, maps, rest = torch.ops.patchsparse, (p.grid.slot, p.grid.coords), (*p.options, backend)
    kernel = list(p.weight.shape[2:])
    return {
        "fwd": lambda: [op.conv2d(p.x, p.weight, None, *maps, *rest)],
        "dgrad": lambda: [op.conv2d_dgrad(p.g, p.weight, *maps, *rest)],
        "wgrad": lambda: [op.conv2d_wgrad(p.x, p.g, *maps, kernel, *rest)],
    }


def _image(packed: Tensor, p: Problem) -> Tensor:
    """Return a whole image of random values of the size that ``packed`` unpacks to."""
    (rows, columns), batch = p.grid.shape, p.grid.batch_size
    size = (batch, packed.shape[1], rows * packed.shape[2], columns * packed.shape[3])
    return torch.randn(size, device=packed.device, dtype=packed.dtype).contiguous(memory_format=torch.channels_last)
