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
from ..onednn import keep_clear
from .adopt import UnsupportedModuleError
from .binding import is_recomputed
from .bound import Bound, entered
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
        grid: the active patches of calls that are given none; another grid may be set at any time.
    """

    def __init__(self, model: nn.Module, grid: PatchGrid):
        """Copy ``model``, dense or sparsified, and mask the copy.

        Raises:
            UnsupportedModuleError: for a module that has no meaning on masked images, see :func:`patchsparse.sparsify`.
        """
        super().__init__()
        self.model = copy.deepcopy(model)
        self.grid = grid
        self._bound = Bound()  # the grid of the call that runs in this thread
        inner: set[nn.Module] = set()  # what belongs to a module that is masked as a whole
        for path, module in self.model.named_modules():
            if module not in inner and self._mask(module, _patch_class(path, module)):
                inner.update(module.modules())

    def forward(self, images: Tensor, grid: PatchGrid | None = None, *, checkpointing: bool | None = None) -> Any:
        """Return what the model makes of ``(B, C, H, W)``.

        Args:
            images: ``(B, C, H, W)``.
            grid: B images; None takes the attribute. Threads that share the module give each call its own.
            checkpointing: as in :func:`patchsparse.bind`.

        Raises:
            ValueError: if the grid has another number of images, or does not divide them.
        """
        grid = self.grid if grid is None else grid
        if images.dim() != 4 or images.shape[0] != grid.batch_size:
            raise ValueError(
                f"images must be (B, C, H, W) with B={grid.batch_size} as the grid, got {tuple(images.shape)}"
            )
        grid.patch_size(images.shape[2:])  # raises where it does not divide
        with entered((self._bound,), grid, is_recomputed(self.model) if checkpointing is None else checkpointing):
            return self.model(images)

    def _mask(self, module: nn.Module, kind: type[PatchModule] | None) -> bool:
        """Replace the forward of one module where it needs that; return whether its children are done with it."""
        target: Any = keep_clear(module) if isinstance(module, nn.Conv2d) else module
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

    def _grid_of(self, x: Tensor) -> PatchGrid | None:
        """Return the grid if ``x`` is a feature map of the images, and not one value per image, say."""
        grid = self._bound.current()
        if grid is None or x.dim() != 4:
            return None
        batch, rows, columns = grid.active.shape
        return grid if x.shape[0] == batch and not (x.shape[2] % rows or x.shape[3] % columns) else None

    def _zeroed(self, forward: Forward, x: Tensor) -> Tensor:
        grid = self._grid_of(x)
        return forward(x if grid is None else x * grid.pixels(x.shape[2:]).unsqueeze(1))

    def _active_only(self, forward: Forward, x: Tensor) -> Tensor:
        """Call ``forward`` on the active pixels of all images as one column."""
        grid = self._grid_of(x)
        if grid is None:
            return forward(x)
        active = grid.pixels(x.shape[2:])
        column = forward(x.permute(0, 2, 3, 1)[active][:, :, None, None])
        y = column.new_zeros(x.shape[0], x.shape[2], x.shape[3], column.shape[1])
        y[active] = column[:, :, 0, 0]
        return y.permute(0, 3, 1, 2)

    def _per_image(self, forward: Forward, pools: bool, channels_last: bool, x: Tensor) -> Tensor:
        """Call ``forward`` on the active pixels of each image as an image that is one pixel high."""
        image = x.permute(0, 3, 1, 2) if channels_last else x
        grid = self._grid_of(image)
        if grid is None:
            return forward(x)
        if len(set(grid.counts().tolist())) > 1:
            raise ValueError("modules that reduce over an image need the same number of active patches in each image")
        active = grid.pixels(image.shape[2:])
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
