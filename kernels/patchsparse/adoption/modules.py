"""Spatial and per-image modules on packed patches: each one *is* an existing module that has been adopted.

Adopting switches the class of a module and leaves the object in place. Parameters, buffers, hooks, state-dict keys
and references to it from elsewhere therefore stay what they were. With no grid bound, ``forward`` is the parent's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..functional import patch_avg_pool2d, patch_conv2d, patch_conv_transpose2d, patch_max_pool2d
from ..geometry import POINT, Stencil, pair
from ..grid import PatchGrid
from ..onednn import ClearConv2d
from ..pointwise import local_conv2d, local_linear
from .binding import Binding
from .reduce import group_norm, image_mean, spread

__all__ = [
    "PatchAdaptiveAvgPool2d",
    "PatchAvgPool2d",
    "PatchConv2d",
    "PatchConvTranspose2d",
    "PatchDropout2d",
    "PatchGroupNorm",
    "PatchImageModule",
    "PatchInstanceNorm2d",
    "PatchLinear",
    "PatchMaxPool2d",
    "PatchModule",
    "PatchPointwiseConv2d",
    "stencil_of",
]


def stencil_of(module: Any) -> Stencil:
    """Return kernel, stride, padding and dilation of a convolution or pooling module; ``"same"`` is resolved.

    Raises:
        ValueError: if ``padding="same"`` needs different padding on both sides, or a stride.
    """
    kernel = pair(module.kernel_size, "kernel_size")
    dilation = pair(getattr(module, "dilation", 1), "dilation")
    stride = pair(module.stride, "stride")
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if total[0] % 2 or total[1] % 2:
            raise ValueError(f"padding='same' of an even kernel {kernel} is not symmetric; use an odd kernel")
        padding = (total[0] // 2, total[1] // 2)
    return Stencil(kernel, stride, pair(padding, "padding"), dilation)


class PatchModule(nn.Module):
    """Base of the modules that :func:`patchsparse.sparsify` puts in place of spatial and per-image ones."""

    patch_binding: Binding
    patch_path: str

    @classmethod
    def adopt(cls, module: Any, binding: Binding, path: str = "") -> Self:
        """Turn ``module`` itself into this class, sharing everything it holds; return it.

        Args:
            module: an instance of the class that this one derives from.
            binding: where the grid will be found.
            path: name of the module in its model, for messages.
        """
        module.__class__ = cls
        module.patch_binding = binding
        module.patch_path = path
        module._adopted()
        return module

    def _adopted(self) -> None:
        """Prepare what forward needs beyond the attributes of the parent class."""

    def _grid(self, x: Tensor) -> PatchGrid | None:
        """Return the bound grid, after a check that ``x`` is packed on it, or None on the dense path."""
        grid = self.patch_binding.current()
        if grid is not None and (x.dim() != 4 or x.shape[0] != grid.num_active):
            raise ValueError(
                f"{self.patch_path or type(self).__name__}: a grid with {grid.num_active} active patches is bound, "
                f"so the input must be ({grid.num_active}, C, p, p), got {tuple(x.shape)}; pass pack(x, grid), or "
                f"leave bind() to run the dense model"
            )
        return grid


class PatchImageModule(PatchModule):
    """Base of the modules that act on each image by reducing over all its active pixels.

    Attributes:
        pools: whether the result is one value per image, and not a map.
    """

    pools: ClassVar[bool] = False


class _Stencilled(PatchModule):
    patch_stencil: Stencil

    def _adopted(self) -> None:
        self.patch_stencil = stencil_of(self)


class PatchConv2d(_Stencilled, ClearConv2d):
    """Convolve packed patches ``(N, C, p, p)``, reading neighbours through the grid that is bound."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C', p/s, p/s)``; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input)
        return self._packed_conv(input, self.weight, grid)

    def _packed_conv(self, x: Tensor, weight: Tensor, grid: PatchGrid) -> Tensor:
        w = self.patch_stencil
        return patch_conv2d(
            x, weight, self.bias, grid, w.stride, w.padding, w.dilation, self.groups, self.patch_binding.backend
        )


class PatchPointwiseConv2d(PatchModule, nn.Conv2d):
    """A 1x1 convolution. It needs no grid, so it also takes one pixel for each image, as behind a global pooling."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)``, or one pixel for each image, to ``C'`` channels."""
        if self.patch_binding.current() is None or input.dim() != 4:
            return super().forward(input)
        return local_conv2d(input, self.weight, self.bias, POINT, self.groups, self.patch_binding.backend)


class PatchLinear(PatchModule, nn.Linear):
    """Multiply the channels of packed patches in channels-last shape ``(N, p, p, C)``; other shapes stay PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C')``."""
        if self.patch_binding.current() is None or input.dim() != 4:
            return super().forward(input)
        return local_linear(input, self.weight, self.bias, self.patch_binding.backend)


class PatchConvTranspose2d(_Stencilled, nn.ConvTranspose2d):
    """Convolve packed patches transposed; the parts that fall into neighbouring patches are exchanged."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return ``(N, C', s*p, s*p)``; ``output_size`` is for the dense path only."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input, output_size)
        if output_size is not None:
            raise ValueError(f"{self.patch_path}: output_size cannot be given for packed patches; use output_padding")
        w = self.patch_stencil
        return patch_conv_transpose2d(
            input,
            self.weight,
            self.bias,
            grid,
            w.stride,
            w.padding,
            pair(list(self.output_padding), "output_padding"),
            self.groups,
            w.dilation,
            self.patch_binding.backend,
        )


class PatchMaxPool2d(_Stencilled, nn.MaxPool2d):
    """Pool packed patches by maximum: an inactive neighbour counts as 0, the image border as -inf."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map ``(N, C, p, p)`` to ``(N, C, p/s, p/s)``; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input)
        w = self.patch_stencil
        return patch_max_pool2d(
            input, grid, w.kernel, w.stride, w.padding, w.dilation, self.ceil_mode, self.patch_binding.backend
        )


class PatchAvgPool2d(_Stencilled, nn.AvgPool2d):
    """Pool packed patches by average: an inactive neighbour is a 0, the border as ``count_include_pad``."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(N, C, p/s, p/s)``; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input)
        w = self.patch_stencil
        return patch_avg_pool2d(
            input,
            grid,
            w.kernel,
            w.stride,
            w.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
            self.patch_binding.backend,
        )


class PatchAdaptiveAvgPool2d(PatchImageModule, nn.AdaptiveAvgPool2d):
    """Average the active pixels of each image, ``(N, C, p, p)`` to ``(B, C, 1, 1)``; 0 if there are none."""

    pools = True

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to ``(B, C, 1, 1)``; run densely where no grid is bound."""
        grid = self._grid(input)
        return super().forward(input) if grid is None else image_mean(input, grid)


class PatchGroupNorm(PatchImageModule, nn.GroupNorm):
    """Normalise groups of channels over the active pixels of each image."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input)
        return group_norm(input, grid, self.num_groups, self.weight, self.bias, self.eps)


class PatchInstanceNorm2d(PatchImageModule, nn.InstanceNorm2d):
    """Normalise every channel over the active pixels of each image; running statistics are not supported."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input)
        return group_norm(input, grid, self.num_features, self.weight, self.bias, self.eps)


class PatchDropout2d(PatchImageModule, nn.Dropout2d):
    """Drop whole channels of whole images, as the dense module does with the same random state."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, p, p)`` to the same shape; run densely where no grid is bound."""
        grid = self._grid(input)
        if grid is None:
            return super().forward(input)
        if not self.training or self.p == 0.0:
            return input
        ones = torch.ones((grid.batch_size, input.shape[1], 1, 1), dtype=input.dtype, device=input.device)
        return input * spread(F.dropout2d(ones, self.p, True), grid)
