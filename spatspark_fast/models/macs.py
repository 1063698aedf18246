"""Count the multiply-adds of a SparK model: dense, on visible patches, and the limit that skipping can reach.

The convolutions and linear layers that actually run are counted, on the meta device, whatever modules issue
them; norms, activations and pooling are left out. A backward pass costs twice the forward, in the same
proportions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.masks import decoded_counts, num_visible
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import SparK

__all__ = ["BlockMacs", "Macs", "SparKMacs", "count_macs", "count_step"]

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


class BlockMacs(NamedTuple):
    """Hold forward multiply-adds of one block: on the whole image, and on those patches that it runs on."""

    name: str
    dense: float
    active: float


class SparKMacs(NamedTuple):
    """Hold the multiply-adds of the parts of a model, dense, and of all its blocks in the order they run in.

    ``densify`` and ``decoder`` run on the whole image, but for the blocks of sparse decoding.
    """

    encoder: Macs
    densify: float
    decoder: float
    blocks: tuple[BlockMacs, ...]

    @property
    def dense_step(self) -> float:
        """Forward multiply-adds of one window when the encoder runs dense-and-mask and all is decoded."""
        return self.encoder.dense + self.densify + self.decoder

    @property
    def sparse_step(self) -> float:
        """Forward multiply-adds of one window when each block runs on its patches only."""
        return sum(block.active for block in self.blocks)

    @property
    def saving(self) -> float:
        """How many times fewer multiply-adds a sparse step has than a dense-and-mask one."""
        return self.dense_step / self.sparse_step

    def active(self, part: str) -> float:
        """Return the multiply-adds of a part (``encoder``, ``densify``, ``decoder``) on the patches it runs on."""
        return sum(block.active for block in self.blocks if block.name.split(".")[0] == part)


def count_macs(model: SparK, size: tuple[int, int], visible: float, decoded: tuple[int, ...] = ()) -> SparKMacs:
    """Count the multiply-adds of ``model`` for one image of ``size`` (H, W) with a ``visible`` share in (0, 1].

    ``decoded`` says what is reconstructed, as `spatspark_fast.models.masks.decoded_counts` does: rows and columns of a
    region, a number of patches, or all with nothing. The two convolutions of an upsampling block count as two, also
    where they run as one. The model itself is not touched; no memory for activations is needed. Raises UserError if
    the patch does not divide the image, ValueError for a share out of range.
    """
    if not 0 < visible <= 1:
        raise ValueError(f"visible must be a share in (0, 1], got {visible}")
    shape = grid_shape(size, model.patch)
    ghost = copy.deepcopy(model).to("meta").eval()
    frames = torch.empty(1, model.in_chans, *size, device="meta")
    stages = {f"encoder.{name}": stage for name, stage in ghost.encoder.named_children()}
    encoder = _Count(lambda: ghost.encode_dense(frames), stages, shape, visible)
    densify, decoder = _behind(ghost, encoder.result, shape)
    blocks = [BlockMacs(name, macs, macs * visible) for name, macs in encoder.blocks.items()]
    active = {**densify.blocks, **decoder.blocks}
    if len(decoded) == 2:
        first = torch.zeros(1, 2, dtype=torch.long, device="meta")
        parts = _behind(ghost, encoder.result, shape, Region(first, decoded, shape, model.patch))
        active = {**parts[0].blocks, **parts[1].blocks}
    elif decoded:
        active["decoder.head"] *= decoded[0] / (shape[0] * shape[1])  # the light decoder's, patch by patch
    dense = {**densify.blocks, **decoder.blocks}
    blocks += [BlockMacs(name, macs, active[name]) for name, macs in dense.items()]
    found = tuple(block for block in blocks if block.dense)
    return SparKMacs(encoder.macs, densify.macs.dense, decoder.macs.dense, found)


def count_step(model: SparK, size: tuple[int, int], mask_ratio: float, decode_ratio: float = 1.0) -> SparKMacs:
    """Count the multiply-adds of a pretraining step as options say it, one window of ``size`` (H, W), forward."""
    shape = grid_shape(size, model.patch)
    patches = shape[0] * shape[1]
    visible = num_visible(patches, mask_ratio)
    return count_macs(model, size, visible / patches, decoded_counts(model, shape, visible, decode_ratio))


def _behind(
    ghost: SparK, features: list[Tensor], shape: tuple[int, int], region: Region | None = None
) -> tuple[_Count, _Count]:
    """Count densify and decoder, for whole images or a region of them."""
    levels = dict(reversed(list(enumerate(ghost.densify.levels))))  # deepest first, as the decoder reads them
    named = {f"densify.levels.{level}": module for level, module in levels.items()}
    densify = _Count(lambda: ghost.densify(features, None, ghost.levels_of(region)), named, shape, 1.0)
    named = {f"decoder.{name}": block for name, block in ghost.decoder.named_children()}
    return densify, _Count(lambda: ghost.decoder(densify.result, region), named, shape, 1.0)


class _Count:
    """Run a part of a model, and hold its result and its multiply-adds, in all and by block.

    A container that is never called itself is counted child by child, as its owner calls them.
    """

    def __init__(
        self, run: Callable[[], Any], blocks: Mapping[str, nn.Module], shape: tuple[int, int], visible: float
    ) -> None:
        self._counter = _Counter(shape, visible)
        self._since: list[float] = []
        counts: dict[str, float] = {}
        children = {
            name: {f"{name}.{child}": module for child, module in block.named_children()}
            for name, block in blocks.items()
            if isinstance(block, nn.ModuleList | nn.Sequential)
        }
        watched = dict(blocks) | {name: module for found in children.values() for name, module in found.items()}
        handles = [handle for name, block in watched.items() for handle in self._watch(name, block, counts)]
        with torch.no_grad(), self._counter:
            self.result = run()
        for handle in handles:
            handle.remove()
        self.macs = Macs(self._counter.dense, self._counter.dense * visible, self._counter.pairs)
        self.blocks: dict[str, float] = {}
        for name in blocks:
            parts = [name] if name in counts or name not in children else list(children[name])
            self.blocks |= {part: counts.get(part, 0.0) for part in parts}
        rest = self.macs.dense - sum(self.blocks.values())
        if rest:  # layers that no block holds
            self.blocks[f"{next(iter(blocks)).split('.')[0]}.others"] = rest

    def _watch(self, name: str, block: nn.Module, counts: dict[str, float]) -> Iterator[Any]:
        def start(*_: Any) -> None:
            self._since.append(self._counter.dense)

        def end(*_: Any) -> None:
            counts[name] = counts.get(name, 0.0) + self._counter.dense - self._since.pop()

        yield block.register_forward_pre_hook(start)
        yield block.register_forward_hook(end)


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
