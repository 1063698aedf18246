"""A whole encoder, forward + backward: packed against plain dense and against dense-and-mask.

Plain dense (channels_last) convolves the whole image once and gets its masking for free: it is the honest rival.
Dense-and-mask is SparK's way. All have the same weights. Packed features and gradients are compared with those of
dense-and-mask before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import timm
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, graphed, pack, sparsify, unpack
from patchsparse.adoption.graphed import Run
from patchsparse.precision import exact_float32
from patchsparse.testing import DenseAndMask

from ..measure.ceilings import ceilings
from ..measure.device import capture
from ..measure.scales import Scale
from ..measure.timing import check_parity
from ..measure.work import counted

__all__ = ["DENSE", "DENSE_AND_MASK", "FEATURES", "GRADIENTS", "Encoders", "encoders"]

PATCH = 32
MASKS = 8  # that steps by `patchsparse.graphed` take in turn
DENSE, DENSE_AND_MASK = "dense", "dense-and-mask"
CHECKED = 8  # images of a batch that are compared, at most
FEATURES = 1e-4  # relative difference up to which features in float32 count as the same
# The same for gradients. Rounding may turn the sign at a ReLU or the winner of a pool, and single entries then differ
# completely. That moves the gradient of a ResNet by up to 2e-3, even between dense-and-mask in float32 and in float64.
GRADIENTS = 1e-2


@dataclass
class Encoders:
    """Ways of running one encoder on one batch.

    Attributes:
        case: encoder and batch, for tables.
        steps: forward + backward by name: one for each engine asked for, ``dense`` and ``dense-and-mask``.
        check: compare all engines with dense-and-mask, which opens the gate.
        scale: sizes of the batch.
        models: what the steps run, by the same names.
        graphed: a step by `patchsparse.graphed` of an engine asked for, with another grid in every call, after its
            gradients were compared with those of the step; raises as `captured` does.
    """

    case: str
    steps: dict[str, Callable[[], object]]
    check: Callable[[], None]
    scale: Scale
    models: dict[str, nn.Module]
    graphed: Callable[[str], Callable[[], object]]

    def bounds(self, way: str) -> tuple[float, float]:
        """Return how many times fewer products ``way`` has than plain dense, and its floor in seconds."""
        ours, dense = (counted(self.steps[name]) for name in (way, DENSE))
        products = [sum(layer.work.macs for layer in layers) for layers in (ours, dense)]
        return products[1] / products[0], ceilings(self.scale).total(ours)

    def captured(self, way: str) -> Callable[[], object]:
        """Return what replays a step as one CUDA graph, after its gradients were compared with those of the step.

        Raises:
            RuntimeError: if it cannot be captured, with the reason.
            AssertionError: if a replay has other gradients.
        """

        def run() -> list[Tensor]:
            self.steps[way]()
            return []

        replay, _ = capture(run)
        gradients = [p.grad for p in self.models[way].parameters() if p.grad is not None]
        found = []
        for once in (self.steps[way], replay):
            for gradient in gradients:
                gradient.zero_()
            once()
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        check_parity(f"{self.case} {way} replayed", found[1], found[0], GRADIENTS)
        return replay

    def compiled(self, way: str) -> Callable[[], object]:
        """Return a step whose model is compiled, after one run."""
        self.models[way].compile()
        self.steps[way]()
        return self.steps[way]


def _backward(features: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
    torch.autograd.backward(list(features), list(directions))


def encoders(name: str, backends: Sequence[str], masked: float, scale: Scale, fuse: bool | None = None) -> Encoders:
    """Build an encoder once for each way, with equal weights, on random frames; ``fuse`` as in `sparsify`."""
    device = scale.device
    torch.manual_seed(0)
    plain = timm.create_model(name, in_chans=scale.frames, features_only=True).train().to(device)
    plain = plain.to(memory_format=torch.channels_last)
    ours = {backend: sparsify(copy.deepcopy(plain), backend=backend, fuse=fuse) for backend in backends}
    side = scale.size // PATCH
    generator = torch.Generator().manual_seed(0)
    grid = PatchGrid.random(scale.batch, (side, side), 1 - masked, generator=generator).to(device)
    frames = torch.randn(scale.batch, scale.frames, scale.size, scale.size, generator=generator).to(device)
    last = frames.contiguous(memory_format=torch.channels_last)
    masking = DenseAndMask(plain, grid).train().to(memory_format=torch.contiguous_format)

    with torch.no_grad():
        directions = _directions(_packed(next(iter(ours.values())), last, grid))
    images = [unpack(d, grid).contiguous() for d in directions]  # gradients in the layout of the features
    noise = [torch.randn_like(image, memory_format=torch.channels_last) for image in images]  # no zeros that save power

    def precision() -> torch.autocast:
        return torch.autocast(device.type, dtype=scale.precision, enabled=scale.precision != torch.float32)

    def timed(run: Callable[[], Sequence[Tensor]], directions: Sequence[Tensor]) -> Callable[[], None]:
        def step() -> None:
            with precision():
                features = run()
            _backward(features, [d.to(f.dtype) for d, f in zip(directions, features, strict=True)])

        return step

    def check() -> None:
        with exact_float32():
            _compare(name, ours, plain, frames[:CHECKED], PatchGrid.from_active(grid.active[:CHECKED]))

    def replayed(way: str) -> Callable[[], object]:
        drawn = [PatchGrid.random(scale.batch, (side, side), 1 - masked, generator=generator) for _ in range(MASKS)]
        masks, model = [grid, *(mask.to(device) for mask in drawn)], copy.deepcopy(ours[way])
        with precision():
            run = graphed(model, last, grid)
        return _graphed(f"{name} batch {scale.batch} {way}", run, last, masks, lambda each: timed(each, directions))

    steps: dict[str, Callable[[], object]] = {
        **{b: timed(lambda model=model: _packed(model, last, grid), directions) for b, model in ours.items()},
        DENSE: timed(lambda: plain(last), noise),
        DENSE_AND_MASK: timed(lambda: masking(frames), images),
    }
    models = {**ours, DENSE: plain, DENSE_AND_MASK: masking}
    return Encoders(f"{name} batch {scale.batch}", steps, check, scale, models, replayed)


def _packed(model: nn.Module, frames: Tensor, grid: PatchGrid) -> list[Tensor]:
    with bind(model, grid):
        return model(pack(frames, grid))


def _graphed(
    case: str, run: Run, frames: Tensor, masks: Sequence[PatchGrid], timed: Callable[[Callable], Callable[[], object]]
) -> Callable[[], object]:
    """Return a step that replays on other masks in turn, after two of them were compared with the eager step."""
    if not run.captured:
        raise RuntimeError(run.reason)
    model, parameters = run.model, [*run.model.parameters()]
    for mask in masks[1:3]:
        eager, replayed = timed(lambda mask=mask: _packed(model, frames, mask)), timed(partial(run, frames, mask))
        check_parity(f"{case} graphed", _accumulated(model, replayed), _accumulated(model, eager), GRADIENTS)
    turns = cycle(masks)
    step = timed(lambda: run(frames, next(turns)))

    def fresh() -> None:  # as in a loop that forgets the gradients of the step before
        for parameter in parameters:
            parameter.grad = None
        step()

    return fresh


def _accumulated(model: nn.Module, step: Callable[[], object]) -> Tensor:
    """Return the gradients that a step leaves in a model, as one vector."""
    model.zero_grad()
    step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _directions(features: Sequence[Tensor]) -> list[Tensor]:
    """Return a random gradient for each feature map, in channels_last memory; ones would vanish in a batch norm."""
    generator = torch.Generator(features[0].device).manual_seed(1)
    random = (torch.randn(f.shape, generator=generator, device=f.device) for f in features)
    return [direction.contiguous(memory_format=torch.channels_last) for direction in random]


def _compare(name: str, ours: dict[str, nn.Module], plain: nn.Module, frames: Tensor, grid: PatchGrid) -> None:
    """Open the gate if features and gradients are those of dense-and-mask."""
    last = frames.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        directions = _directions(_packed(next(iter(ours.values())), last, grid))
    masking = DenseAndMask(plain, grid).train()
    whole = masking(frames)
    expected = _gradients(masking, whole, [unpack(d, grid) for d in directions])
    for backend, model in ours.items():
        features = _packed(model, last, grid)
        for level, (own, other) in enumerate(zip(features, whole, strict=True)):
            check_parity(f"{name} {backend} level {level}", own, pack(other.detach(), grid), FEATURES)
        check_parity(f"{name} {backend} gradient", _gradients(model, features, directions), expected, GRADIENTS)


def _gradients(model: nn.Module, features: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Return the gradients of all parameters as one vector."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(list(features), parameters, list(directions), allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])
