"""Forecast an image that is too large for memory in tiles that overlap and fade into each other."""

from __future__ import annotations

import torch
from torch import Tensor

from spatspark_fast.common.options import need
from spatspark_fast.models.forecaster import Forecaster

__all__ = ["check_tile", "predict_tiled", "tile_starts", "tile_weights"]


def check_tile(tile: int | None, multiple: int) -> None:
    """Raise UserError unless ``tile`` is a positive multiple of what a model needs, or None; see `predict_tiled`."""
    if tile is not None:
        need(tile >= 1 and tile % multiple == 0, "tile", tile, f"give a multiple of {multiple} pixels for this model")


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Place tiles along a side of ``length`` pixels: at least ``overlap`` shared, the last one flush at the end."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def tile_weights(tile: int, overlap: int) -> Tensor:
    """Return the weight of a tile along one side ``(tile,)`` float32: a ramp over each overlap, 1 between."""
    distance = torch.arange(tile, dtype=torch.float32) + 1.0
    ramp = torch.minimum(distance, distance.flip(0)) / (overlap + 1)
    return ramp.clamp(max=1.0)


def predict_tiled(model: Forecaster, frames: Tensor, tile: int | None) -> Tensor:
    """Return ``model.predict(frames)``, ``(B, out_length, H, W)``, computed in tiles of ``tile`` pixels.

    Tiles share a quarter of their side, over which they fade linearly. Without ``tile``, or where the image is
    no larger, it is one call.

    Raises:
        UserError: the tile is no positive multiple of the model's ``multiple``.
    """
    height, width = frames.shape[-2:]
    if tile is None or (height <= tile and width <= tile):
        return model.predict(frames)
    check_tile(tile, model.multiple)
    overlap = tile // 4
    shape = (frames.shape[0], model.out_length, height, width)
    total, weights = frames.new_zeros(shape), frames.new_zeros(height, width)
    fade = tile_weights(tile, overlap).to(frames.device)
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            part = frames[..., top : top + tile, left : left + tile]
            rows, columns = part.shape[-2:]
            weight = fade[:rows, None] * fade[None, :columns]
            total[..., top : top + rows, left : left + columns] += model.predict(part) * weight
            weights[top : top + rows, left : left + columns] += weight
    return total / weights
