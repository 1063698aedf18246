"""A whole ResNet-18 in MinkowskiEngine's own modules, beside ours with equal weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack, sparsify, unpack
from patchsparse.backends.minkowski.loading import module
from patchsparse.testing import DenseAndMask

from ..measure.scales import MASKED, Scale
from ..measure.timing import check_parity
from ..subjects.convolutions import fresh
from ..subjects.encoders import FEATURES, GRADIENTS
from .base import to_rows
from .minkowski import begin, in_order, minkowski_weight, order_of

__all__ = ["MinkowskiResNet", "ResNets"]

PATCH = 32


class MinkowskiResNet(nn.Module):
    """A timm ResNet of basic blocks in MinkowskiEngine's modules, with copies of its weights.

    ``forward`` takes the features ``(rows, C)`` of active pixels and `begin`'s manager and key. Max-pooling follows a
    ReLU, where it is the same to leave inactive pixels out or to read 0.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        blocks = [getattr(plain, f"layer{level}") for level in range(1, 5)]
        self.stem = nn.Sequential(*_conv_norm(plain.conv1, plain.bn1), module().MinkowskiReLU())
        self.pool = module().MinkowskiMaxPooling(kernel_size=3, stride=2, dimension=2)
        self.levels = nn.ModuleList(nn.Sequential(*map(_Block, level)) for level in blocks)  # pyright: ignore[reportArgumentType]

    def forward(self, rows: Tensor, manager: Any, key: Any) -> list[Any]:
        """Return the sparse tensors of all levels."""
        x = self.stem(module().SparseTensor(rows, coordinate_map_key=key, coordinate_manager=manager))
        features = [x]
        x = self.pool(x)
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


def _conv_norm(conv: Any, norm: Any) -> tuple[nn.Module, nn.Module]:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    options = {"kernel_size": kernel, "stride": stride, "dimension": 2}
    sparse = module().MinkowskiConvolution(conv.in_channels, conv.out_channels, **options)
    sparse_norm = module().MinkowskiBatchNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    with torch.no_grad():
        sparse.kernel.copy_(minkowski_weight(conv.weight, stride=stride))
    sparse_norm.bn.load_state_dict(norm.state_dict())
    return sparse, sparse_norm


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        relu = module().MinkowskiReLU
        self.first = nn.Sequential(*_conv_norm(block.conv1, block.bn1), relu())
        self.second = nn.Sequential(*_conv_norm(block.conv2, block.bn2))
        self.last = relu()
        self.shortcut = nn.Identity() if block.downsample is None else nn.Sequential(*_conv_norm(*block.downsample))

    def forward(self, x: Any) -> Any:
        return self.last(self.second(self.first(x)) + self.shortcut(x))


class ResNets:
    """A ResNet-18 of ours and of MinkowskiEngine with equal weights, on one batch of random frames."""

    def __init__(self, scale: Scale) -> None:
        torch.manual_seed(0)
        self.plain = timm.create_model("resnet18", in_chans=scale.frames, features_only=True).train()
        self.plain = self.plain.to(memory_format=torch.channels_last)
        self.ours, self.theirs = sparsify(copy.deepcopy(self.plain)), MinkowskiResNet(self.plain).train()
        generator, side = torch.Generator().manual_seed(0), scale.size // PATCH
        self.grid = PatchGrid.random(scale.layer_batch, (side, side), 1 - MASKED, generator=generator)
        frames = torch.randn(scale.layer_batch, scale.frames, scale.size, scale.size, generator=generator)
        self.frames = frames.contiguous(memory_format=torch.channels_last)
        self.rows = to_rows(pack(self.frames, self.grid)).contiguous()
        self.known = begin(self.grid, PATCH)
        with torch.no_grad():
            self.features, self.sparse = self.packed(self.grid), self.minkowski(*self.known)
        self.directions = [torch.randn(f.shape, generator=generator) for f in self.features]
        self.order = [
            order_of(self.grid, level.C, PATCH // level.tensor_stride[0], level.tensor_stride[0])
            for level in self.sparse
        ]
        self.sparse_directions = [to_rows(d)[order] for d, order in zip(self.directions, self.order, strict=True)]

    def packed(self, grid: PatchGrid) -> list[Tensor]:
        """Return our features, packed, shallow to deep."""
        with bind(self.ours, grid):
            return self.ours(pack(self.frames, grid))

    def minkowski(self, manager: Any, key: Any) -> list[Any]:
        """Return MinkowskiEngine's sparse tensors, shallow to deep."""
        return self.theirs(self.rows, manager, key)

    def check(self) -> None:
        """Open the gate if both have the features and the gradients of dense-and-mask."""
        masking = DenseAndMask(self.plain, self.grid).train()
        whole = masking(self.frames)
        for name, features in (("ours", self.packed(self.grid)), ("minkowski", self._theirs_packed())):
            for level, (own, other) in enumerate(zip(features, whole, strict=True)):
                check_parity(f"{name} level {level}", own, pack(other.detach(), self.grid), FEATURES)
        expected = first_gradients(masking, whole, [unpack(d, self.grid) for d in self.directions])
        check_parity(
            "our gradient", first_gradients(self.ours, self.packed(self.grid), self.directions), expected, GRADIENTS
        )
        sparse = [level.F for level in self.minkowski(*self.known)]
        theirs = first_gradients(self.theirs, sparse, self.sparse_directions)
        theirs = theirs.view(7, 7, -1, 64).permute(3, 2, 1, 0)
        check_parity("minkowski gradient", theirs, expected, GRADIENTS)

    def _theirs_packed(self) -> list[Tensor]:
        levels = zip(self.minkowski(*self.known), self.order, strict=True)
        return [in_order(level.F, order, PATCH // level.tensor_stride[0]) for level, order in levels]

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return forward + backward of both, on a known mask and on a new one."""

        def ours(grid: Callable[[], PatchGrid]) -> Callable[[], None]:
            return lambda: torch.autograd.backward(self.packed(grid()), self.directions)

        def theirs(begin: Callable[[], tuple]) -> Callable[[], None]:
            def step() -> None:
                torch.autograd.backward([level.F for level in self.minkowski(*begin())], self.sparse_directions)

            return step

        return {
            "auto step": ours(lambda: self.grid),
            "minkowski step": theirs(lambda: self.known),
            "auto step + map": ours(lambda: fresh(self.grid)),
            "minkowski step + map": theirs(lambda: begin(self.grid, PATCH)),
        }


def first_gradients(model: nn.Module, features: list[Tensor], directions: list[Tensor]) -> Tensor:
    """Return the gradient of the first convolution's weight, to which all other layers contribute."""
    return torch.autograd.grad(features, next(model.parameters()), directions)[0]
