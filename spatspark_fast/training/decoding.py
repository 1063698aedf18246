"""Which patches a pretraining step reconstructs."""

from patchsparse import PatchGrid
from spatspark_fast.masks import MaskSampler
from spatspark_fast.models.spark import SparK

__all__ = ["patches_to_decode"]


def patches_to_decode(
    model: SparK, masks: MaskSampler, grid: PatchGrid, share: float, step: int, rank: int = 0
) -> PatchGrid | None:
    """Return the patches that ``model`` reconstructs at a ``step``, a ``share`` of all, or None for whole images.

    Sparse decoding draws them at random. Where patches can be left out without changing anything
    (`SparK.decodes_apart`) those that the loss does not read are, also at a share of 1.
    """
    apart = model.decodes_apart and grid.num_active < grid.active.numel()
    if share >= 1 and not apart:
        return None
    return masks.decoded(grid, share, step, rank, masked=model.loss_on == "masked")
