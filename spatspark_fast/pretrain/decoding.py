"""Which patches a pretraining step reconstructs."""

from patchsparse import PatchGrid
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain.masks import MaskSampler

__all__ = ["leaves_patches_out", "patches_to_decode"]


def leaves_patches_out(model: SparK, visible: int, patches: int, share: float) -> bool:
    """Return whether a step reconstructs less than whole images, of which ``visible`` of ``patches`` are seen.

    It does below a ``share`` of 1, and where that changes nothing (`SparK.decodes_apart`), if any patch is masked.
    """
    return share < 1 or (model.decodes_apart and visible < patches)


def patches_to_decode(
    model: SparK, masks: MaskSampler, grid: PatchGrid, share: float, step: int, rank: int = 0
) -> PatchGrid | None:
    """Return the patches that ``model`` reconstructs at a ``step``, a ``share`` of all, or None for whole images.

    Sparse decoding draws them at random. Where patches can be left out without changing anything
    (`SparK.decodes_apart`) those that the loss does not read are, also at a share of 1.
    """
    if not leaves_patches_out(model, grid.num_active, grid.active.numel(), share):
        return None
    return masks.decoded(grid, share, step, rank, masked=model.loss_on == "masked")
