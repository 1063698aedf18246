"""Dense-and-mask, SparK's way of leaving patches out: whole images, with what is inactive masked between the layers.

This is the meaning that packed patches must have, and the cost that they must beat.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import pair
from ..grid import PatchGrid
from .adopt import UnsupportedModuleError
from .fused import PatchContainer
from .modules import PatchImageModule, PatchLinear, PatchModule, PatchPointwiseConv2d
from .rules import find_rule

__all__ = ["DenseAndMask"]

Forward = Callable[..., Tensor]
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class DenseAndMask(nn.Module):
    """Run a copy of a model on whole images, masked as SparK does it (arXiv 2301.03580).

    Modules that read more than a pixel see 0 where a patch is inactive. Batch norms see the active pixels alone, and
    modules that reduce over an image those of each image. All other modules run as they are, and so do functional
    calls in a ``forward``. Feature maps are right at active pixels only.

    Attributes:
        model: the copy; names of modules and parameters are those of the original.
        grid: the active patches; another grid may be set at any time.
    """

    def __init__(self, model: nn.Module, grid: PatchGrid):
        """Copy ``model``, dense or sparsified, and mask the copy.

        Raises:
            UnsupportedModuleError: for a module that has no meaning on masked images, see :func:`patchsparse.sparsify`.
        """
        super().__init__()
        self.model = copy.deepcopy(model)
        self.grid = grid
        inner: set[nn.Module] = set()  # what belongs to a module that is masked as a whole
        for path, module in self.model.named_modules():
            if module not in inner and self._mask(module, _patch_class(path, module)):
                inner.update(module.modules())

    def forward(self, images: Tensor) -> Any:
        """Return what the model makes of ``(B, C, H, W)``.

        Raises:
            ValueError: if the grid has another number of images, or does not divide them.
        """
        if images.dim() != 4 or images.shape[0] != self.grid.batch_size:
            raise ValueError(
                f"images must be (B, C, H, W) with B={self.grid.batch_size} as the grid, got {tuple(images.shape)}"
            )
        self.grid.patch_size(images.shape[2:])  # raises where it does not divide
        return self.model(images)

    def _mask(self, module: nn.Module, kind: type[PatchModule] | None) -> bool:
        """Replace the forward of one module where it needs that; return whether its children are done with it."""
        target: Any = module
        if kind is not None and issubclass(kind, PatchImageModule):
            last = getattr(module, "channel_dim", 1) == -1
            target.forward = partial(self._per_image, target.forward, kind.pools, last)
            return True
        if isinstance(module, _BATCH_NORM):
            target.forward = partial(self._active_only, target.forward)
            return True
        if kind is not None and _reads_neighbours(module, kind):
            target.forward = partial(self._zeroed, target.forward)
        return False

    def _fits(self, x: Tensor) -> bool:
        """Whether ``x`` is a feature map of the images, and not one value per image, say."""
        batch, rows, columns = self.grid.active.shape
        return x.dim() == 4 and x.shape[0] == batch and not (x.shape[2] % rows or x.shape[3] % columns)

    def _zeroed(self, forward: Forward, x: Tensor) -> Tensor:
        return forward(x * self.grid.pixels(x.shape[2:]).unsqueeze(1) if self._fits(x) else x)

    def _active_only(self, forward: Forward, x: Tensor) -> Tensor:
        """Call ``forward`` on the active pixels of all images as one column."""
        if not self._fits(x):
            return forward(x)
        active = self.grid.pixels(x.shape[2:])
        column = forward(x.permute(0, 2, 3, 1)[active][:, :, None, None])
        y = column.new_zeros(x.shape[0], x.shape[2], x.shape[3], column.shape[1])
        y[active] = column[:, :, 0, 0]
        return y.permute(0, 3, 1, 2)

    def _per_image(self, forward: Forward, pools: bool, channels_last: bool, x: Tensor) -> Tensor:
        """Call ``forward`` on the active pixels of each image as an image that is one pixel high."""
        image = x.permute(0, 3, 1, 2) if channels_last else x
        if not self._fits(image):
            return forward(x)
        if len(set(self.grid.counts().tolist())) > 1:
            raise ValueError("modules that reduce over an image need the same number of active patches in each image")
        active = self.grid.pixels(image.shape[2:])
        rows = image.permute(0, 2, 3, 1)[active]
        lines = rows.view(image.shape[0], 1, rows.shape[0] // image.shape[0], rows.shape[1])
        out = forward(lines if channels_last else lines.permute(0, 3, 1, 2))
        if pools:
            return out
        y = torch.zeros_like(image.permute(0, 2, 3, 1))
        y[active] = (out if channels_last else out.permute(0, 2, 3, 1)).flatten(0, 2).to(y.dtype)
        return y if channels_last else y.permute(0, 3, 1, 2)


def _patch_class(path: str, module: nn.Module) -> type[PatchModule] | None:
    """Return the class that has adopted ``module`` or would adopt it, None if it stays what it is."""
    if isinstance(module, PatchModule):
        return type(module)
    rule = find_rule(module)
    if rule is None:
        return None
    if (reason := rule.refuse(module)) is not None:
        raise UnsupportedModuleError(path, module, reason)
    return rule.target()


def _reads_neighbours(module: Any, kind: type[PatchModule]) -> bool:
    if issubclass(kind, PatchLinear | PatchPointwiseConv2d | PatchContainer):
        return False
    return not hasattr(module, "kernel_size") or max(pair(module.kernel_size, "kernel_size")) > 1
