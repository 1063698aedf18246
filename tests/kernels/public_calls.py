"""A call of every public function that computes, by the names of ``patchsparse.__all__``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import patchsparse as ps

__all__ = ["CALLS", "COMPUTING", "GRID", "PublicCall", "inputs_of"]

GRID = ps.PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
COMPUTING = {n for n in ps.__all__ if n.startswith(("patch_", "image_conv", "pack", "unpack"))}


class PublicCall(NamedTuple):
    """A call on tensors of normal noise.

    Attributes:
        function: its name.
        run: calls it by an engine on the inputs.
        shapes: of the inputs, all of which are differentiated.
    """

    function: str
    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def _alone(sums: Tensor) -> Tensor:
    """Return what the only process of a group gathers."""
    return sums[None]


def _pooled(function: Any, *options: Any, **more: Any) -> Callable[..., Tensor]:
    return lambda b, x: function(x, GRID, *options, backend=b, **more)


PACKED, WEIGHT, VECTOR = (8, 4, 4, 4), (6, 4, 3, 3), (4,)
CALLS: dict[str, PublicCall] = {
    "pack": PublicCall("pack", lambda b, x: ps.pack(x, GRID), ((2, 4, 12, 12),)),
    "pack, one channel": PublicCall("pack", lambda b, x: ps.pack(x, GRID), ((2, 1, 12, 12),)),
    "unpack": PublicCall("unpack", lambda b, x: ps.unpack(x, GRID), (PACKED,)),
    "unpack, fill": PublicCall("unpack", lambda b, x, fill: ps.unpack(x, GRID, fill), (PACKED, VECTOR)),
    "conv": PublicCall(
        "patch_conv2d",
        lambda b, x, w, c: ps.patch_conv2d(x, w, c, GRID, padding=1, backend=b),
        (PACKED, WEIGHT, (6,)),
    ),
    "conv, one channel": PublicCall(
        "patch_conv2d",
        lambda b, x, w: ps.patch_conv2d(x, w, None, GRID, 2, 1, backend=b),
        ((8, 1, 4, 4), (16, 1, 3, 3)),
    ),
    "conv, wide": PublicCall(  # by rows in `gather`, by Winograd's method in `cpp`
        "patch_conv2d",
        lambda b, x, w: ps.patch_conv2d(x, w, None, GRID, padding=1, backend=b),
        ((8, 64, 2, 2), (64, 64, 3, 3)),
    ),
    "conv, depthwise": PublicCall(
        "patch_conv2d",
        lambda b, x, w: ps.patch_conv2d(x, w, None, GRID, padding=1, groups=4, backend=b),
        (PACKED, (4, 1, 3, 3)),
    ),
    "conv, 1x1": PublicCall(
        "patch_conv2d",
        lambda b, x, w: ps.patch_conv2d(x, w, None, GRID, backend=b),
        (PACKED, (6, 4, 1, 1)),
    ),
    "transposed": PublicCall(
        "patch_conv_transpose2d",
        lambda b, x, w, c: ps.patch_conv_transpose2d(x, w, c, GRID, 2, 1, backend=b),
        (PACKED, (4, 3, 4, 4), (3,)),
    ),
    "transposed, no bias": PublicCall(
        "patch_conv_transpose2d",
        lambda b, x, w: ps.patch_conv_transpose2d(x, w, None, GRID, 2, 1, backend=b),
        (PACKED, (4, 3, 4, 4)),
    ),
    "max pool": PublicCall("patch_max_pool2d", _pooled(ps.patch_max_pool2d, 3, 2, 1), (PACKED,)),
    "max pool, local": PublicCall("patch_max_pool2d", _pooled(ps.patch_max_pool2d, 2), (PACKED,)),
    "average pool": PublicCall("patch_avg_pool2d", _pooled(ps.patch_avg_pool2d, 3, 1, 1), (PACKED,)),
    "average pool, inside": PublicCall(
        "patch_avg_pool2d", _pooled(ps.patch_avg_pool2d, 3, 2, 1, count_include_pad=False), (PACKED,)
    ),
    "norm": PublicCall(
        "patch_batch_norm_act",
        lambda b, x, w, c, r: ps.patch_batch_norm_act(
            x, w, c, None, None, True, activation="silu", residual=r, backend=b
        ),
        (PACKED, VECTOR, VECTOR, PACKED),
    ),
    "norm, plain": PublicCall(
        "patch_batch_norm_act",
        lambda b, x: ps.patch_batch_norm_act(x, None, None, None, None, True, backend=b),
        (PACKED,),
    ),
    "norm, joined": PublicCall(
        "patch_batch_norm_act",
        lambda b, x: ps.patch_batch_norm_act(x, None, None, None, None, True, backend=b, all_gather=_alone),
        (PACKED,),
    ),
    "norm, images": PublicCall(
        "patch_batch_norm_unpack",
        lambda b, x, w, f: ps.patch_batch_norm_unpack(x, GRID, w, None, None, None, f, True, backend=b),
        (PACKED, VECTOR, VECTOR),
    ),
    "norm, images, joined": PublicCall(
        "patch_batch_norm_unpack",
        lambda b, x: ps.patch_batch_norm_unpack(x, GRID, None, None, None, None, backend=b, all_gather=_alone),
        (PACKED,),
    ),
    "image": PublicCall(
        "image_conv2d",
        lambda b, x, w: ps.image_conv2d(x, w, None, b),
        ((2, 32, 4, 4), (32, 32, 3, 3)),
    ),
    "image, transposed": PublicCall(
        "image_conv_transpose2d",
        lambda b, x, w: ps.image_conv_transpose2d(x, w, None, b),
        ((2, 4, 4, 4), (4, 3, 4, 4)),
    ),
}


def inputs_of(call: PublicCall, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return leaves that require gradients."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in call.shapes]
