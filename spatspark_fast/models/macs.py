"""Count the multiply-adds of a SparK model: dense, on visible patches, and the limit that skipping can reach.

The convolutions and linear layers that actually run are counted, on the meta device, whatever modules issue
them; norms, activations and pooling are left out. A backward pass costs twice the forward, in the same
proportions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.spark import SparK

__all__ = ["Macs", "SparKMacs", "count_macs"]

aten = torch.ops.aten


class Macs(NamedTuple):
    """Hold multiply-adds of one image, forward.

    ``dense``: the whole image, inactive positions and zero padding included (what dense-and-mask costs).
    ``visible``: outputs at visible positions only, all taps. ``pairs``: the expected number of (active
    output, active neighbour) pairs for a random mask; no method needs less.
    """

    dense: float
    visible: float
    pairs: float


class SparKMacs(NamedTuple):
    """Hold the multiply-adds of the parts of a model; densify and decoder always run on the whole image."""

    encoder: Macs
    densify: float
    decoder: float

    @property
    def dense_step(self) -> float:
        """Forward multiply-adds of one window when the encoder runs dense-and-mask."""
        return self.encoder.dense + self.densify + self.decoder

    @property
    def sparse_step(self) -> float:
        """Forward multiply-adds of one window when the encoder runs on visible patches."""
        return self.encoder.visible + self.densify + self.decoder

    @property
    def saving(self) -> float:
        """How many times fewer multiply-adds a sparse step has than a dense-and-mask one."""
        return self.dense_step / self.sparse_step


def count_macs(model: SparK, size: tuple[int, int], visible: float) -> SparKMacs:
    """Count the multiply-adds of ``model`` for one image of ``size`` (H, W) with a ``visible`` share in (0, 1].

    The model itself is not touched; no memory for activations is needed. Raises UserError if the patch does
    not divide the image, ValueError for a share out of range.
    """
    if not 0 < visible <= 1:
        raise ValueError(f"visible must be a share in (0, 1], got {visible}")
    shape = grid_shape(size, model.patch)
    ghost = copy.deepcopy(model).to("meta").eval()
    frames = torch.empty(1, model.in_chans, *size, device="meta")
    encoder, features = _count(lambda: ghost.encode_dense(frames), shape, visible)
    densify, densified = _count(lambda: ghost.densify(features), shape, visible)
    decoder, _ = _count(lambda: ghost.decoder(densified), shape, visible)
    return SparKMacs(encoder, densify.dense, decoder.dense)


def _count(run: Callable[[], Any], shape: tuple[int, int], visible: float) -> tuple[Macs, Any]:
    with torch.no_grad(), _Counter(shape, visible) as counter:
        result = run()
    return Macs(counter.dense, counter.dense * visible, counter.pairs), result


class _Counter(TorchDispatchMode):
    """Add up the multiply-adds of every convolution and matrix product that reaches the dispatcher."""

    def __init__(self, shape: tuple[int, int], visible: float) -> None:
        super().__init__()
        self.shape = shape
        self.visible = visible
        patches = shape[0] * shape[1]
        # Of the other patches, a random mask of fixed size leaves this share visible.
        self.neighbour = (visible * patches - 1) / (patches - 1) if patches > 1 else 0.0
        self.neighbour = max(self.neighbour, 0.0)
        self.dense = 0.0
        self.pairs = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten.convolution:
            self._convolution(result, args)
        elif packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            left = args[-2]
            self._pointwise(result.numel() * left.shape[-1])
        return result

    def _pointwise(self, macs: float) -> None:
        self.dense += macs
        self.pairs += macs * self.visible

    def _convolution(self, result: Tensor, args: Sequence[Any]) -> None:
        source, weight, _, stride, padding, dilation, transposed = args[:7]
        if transposed:  # every input pixel meets every tap
            self._pointwise(source.numel() * weight[0].numel())
            return
        per_pair = weight.shape[0] * weight.shape[1]  # output channels x input channels of a group
        self.dense += result.shape[0] * per_pair * result.shape[2:].numel() * weight.shape[2:].numel()
        rows, columns = (
            _tap_counts(
                result.shape[2 + axis],
                source.shape[2 + axis],
                weight.shape[2 + axis],
                self.shape[axis],
                (stride[axis], padding[axis], dilation[axis]),
            )
            for axis in (0, 1)
        )
        same, inside = rows[0] * columns[0], rows[1] * columns[1]
        expected = self.visible * (same + self.neighbour * (inside - same))
        self.pairs += result.shape[0] * per_pair * expected


def _tap_counts(
    out_length: int, in_length: int, kernel: int, patches: int, geometry: tuple[int, int, int]
) -> tuple[int, int]:
    """Count along one axis the (output, tap) pairs inside the output's own patch, and inside the image."""
    stride, padding, dilation = geometry
    output = np.arange(out_length)[:, None]
    place = output * stride - padding + np.arange(kernel)[None] * dilation
    inside = (place >= 0) & (place < in_length)
    # A pooled image (squeeze and excitation) has fewer pixels than patches: it counts as one patch.
    patches = patches if out_length % patches == 0 and in_length % patches == 0 else 1
    same = inside & (place // max(in_length // patches, 1) == output // max(out_length // patches, 1))
    return int(same.sum()), int(inside.sum())
