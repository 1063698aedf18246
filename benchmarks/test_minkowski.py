"""MinkowskiEngine on torch's own BLAS: layers and a whole ResNet-18, forward + backward, against our automatic choice.

Batch 8, 288x288 in 9x9 patches, 60 % masked, float32. ``+ map`` rows meet a new mask in every pass, as training does:
MinkowskiEngine finds its coordinates and pairs again, and ours builds its row lists again. The others meet a mask that
both have met before. Outputs and gradients of all are compared with dense-and-mask first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack, sparsify, unpack
from spatspark_fast.pretrain.savings import DenseAndMask

from .measure.contenders import Case, contenders, peer_rows
from .measure.scales import Scale
from .measure.timing import check_parity, in_turn
from .peers import Minkowski, Packed
from .peers.base import to_packed, to_rows
from .peers.minkowski import MinkowskiResNet
from .peers.sites import rows_at
from .subjects.convolutions import GROUPS, operators, problem
from .subjects.encoders import FEATURES, GRADIENTS

MASKED, PATCH = 0.6, 32
MISSING = Minkowski().why_not()

pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: python -m benchmarks.gpu.kernels"),
]


@pytest.mark.parametrize("shape", [*GROUPS["3x3"], *GROUPS["depthwise"]], ids=str)
def test_layers(benchmark, record, scale, shape):
    p = problem(shape, MASKED, scale.layer_batch, torch.float32, "cpu", (scale.layer_side,) * 2)
    case = Case(p, MASKED, min(5, scale.layer_rounds) if shape.depthwise else scale.layer_rounds)
    found = contenders(case, Packed("auto", "cpu"), (Minkowski(),), set())
    if len(found) != 2:
        raise AssertionError(f"MinkowskiEngine did not run {shape} rightly; see the line above")
    for row in peer_rows(case, found, ("fwd", "step", "step + map")):
        record.row(row | {"suite": "minkowski"})
    benchmark.pedantic(operators(p, "auto")["fwd"], rounds=1)


def fresh(grid: PatchGrid) -> PatchGrid:
    """Return the same mask as one that was never met."""
    return PatchGrid(grid.active, grid.coords.clone(), grid.slot.clone())


class Encoders:
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
        self.known = MinkowskiResNet.begin(self.grid, PATCH)
        with torch.no_grad():
            self.features, self.sparse = self.packed(self.grid), self.minkowski(*self.known)
        self.directions = [torch.randn(f.shape, generator=generator) for f in self.features]
        self.order = [self._order(level) for level in self.sparse]
        self.sparse_directions = [to_rows(d)[order] for d, order in zip(self.directions, self.order, strict=True)]

    def packed(self, grid: PatchGrid) -> list[Tensor]:
        with bind(self.ours, grid):
            return self.ours(pack(self.frames, grid))

    def minkowski(self, manager, key) -> list:
        return self.theirs(self.rows, manager, key)

    def _order(self, level) -> Tensor:
        """Return the packed row of each row of a sparse tensor."""
        where, spacing = level.C.long(), level.tensor_stride[0]
        where[:, 1:] //= spacing
        return rows_at(self.grid, PATCH // spacing, where).long()

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
        packed = []
        for level, order in zip(self.minkowski(*self.known), self.order, strict=True):
            rows = torch.full_like(level.F, torch.nan)
            rows[order] = level.F
            packed.append(to_packed(rows, PATCH // level.tensor_stride[0]))
        return packed

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
            "minkowski step + map": theirs(lambda: MinkowskiResNet.begin(self.grid, PATCH)),
        }


def first_gradients(model: nn.Module, features: list[Tensor], directions: list[Tensor]) -> Tensor:
    """Return the gradient of the first convolution's weight, to which all other layers contribute."""
    return torch.autograd.grad(features, next(model.parameters()), directions)[0]


def test_encoder(benchmark, record, scale):
    ways = Encoders(scale)
    ways.check()
    steps = ways.steps()
    timing = in_turn(steps, max(scale.rounds, min(5, scale.layer_rounds)), warmup=1)
    for kind in ("step", "step + map"):
        pair = f"auto {kind}", f"minkowski {kind}"
        ratio, values = timing.ratio(*reversed(pair)), timing.medians(*pair)
        record(
            "minkowski",
            f"resnet18 batch {scale.layer_batch} {kind}",
            "auto fp32",
            "minkowski fp32",
            ratio,
            values,
            "s",
            masked=MASKED,
        )
    benchmark.pedantic(steps["auto step"], rounds=1)
