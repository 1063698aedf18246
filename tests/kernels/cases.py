"""Random cases for the kernel tests: grids with unequal counts, and windows that map patches to patches."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from patchsparse import PatchGrid


@dataclass(frozen=True)
class Case:
    """A random problem; ``stencil`` holds stride, padding, dilation as keyword arguments of the functional API."""

    grid: PatchGrid
    image: Tensor
    kernel: tuple[int, int]
    stencil: dict
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.image.dtype)


def _axis(draw, patch: int, kernels: list[int], dilations: list[int]) -> tuple[int, int, int, int]:
    k = draw(st.sampled_from(kernels))
    s = draw(st.sampled_from([s for s in (1, 2, 4) if patch % s == 0]))
    d = draw(st.sampled_from(dilations))
    reach = d * (k - 1)
    paddings = [p for p in range(reach // 2 + 1) if reach + 1 - s <= 2 * p]
    if not paddings:  # an even kernel at this stride has no aligned padding: a 1-pixel kernel always does
        return 1, s, 0, 1
    return k, s, draw(st.sampled_from(paddings)), d


@st.composite
def cases(
    draw,
    kernels=(1, 2, 3, 5, 7),
    dilations=(1, 2),
    channels=(1, 3, 4, 8, 17),
    patches=(1, 2, 3, 4, 8),
    dtype=torch.float64,
    shares=(0.0, 0.3, 0.6, 1.0),
) -> Case:
    """Draw a case with rectangular patches, grids and kernels, and any number of active patches."""
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    height, width = draw(st.sampled_from(patches)), draw(st.sampled_from(patches))
    vertical = _axis(draw, height, list(kernels), list(dilations))
    horizontal = _axis(draw, width, list(kernels), list(dilations))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    share = draw(st.sampled_from(shares))
    grid = PatchGrid.from_active(torch.rand(batch, rows, columns, generator=generator) < share)
    image = torch.randn(
        batch,
        draw(st.sampled_from(channels)),
        rows * height,
        columns * width,
        generator=generator,
        dtype=dtype,
    )
    names = ("stride", "padding", "dilation")
    stencil = {n: (vertical[i + 1], horizontal[i + 1]) for i, n in enumerate(names)}
    return Case(grid, image, (vertical[0], horizontal[0]), stencil, seed)


def upsampled(active: Tensor, height: int, width: int) -> Tensor:
    """Return the ``(B, 1, H, W)`` bool map of active pixels."""
    rows, columns = active.shape[1:]
    return active[:, None].repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)


def packed_of(image: Tensor, active: Tensor) -> Tensor:
    """Cut active patches with nothing but reshaping and boolean indexing, row-major as the grid's."""
    batch, channels, height, width = image.shape
    rows, columns = active.shape[1:]
    patches = image.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return patches.permute(0, 2, 4, 1, 3, 5)[active]
