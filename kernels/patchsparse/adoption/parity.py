"""The parity check behind ``sparsify(model, verify=True)``: a training step, packed against dense-and-mask."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..grid import PatchGrid
from ..packing import pack
from .adopt import UnsupportedModuleError, adopt, plan_adoption
from .binding import bind
from .dense_and_mask import DenseAndMask
from .fused import PatchContainer
from .modules import PatchImageModule
from .recording import Record, recording, tensors_of

__all__ = ["check_parity"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm

# Three patches of each image, since all images need the same number; one patch has no active neighbour.
_ACTIVE = (((1, 1, 0), (0, 1, 0)), ((1, 0, 1), (0, 0, 1)))


def check_parity(
    model: nn.Module,
    *,
    in_channels: int | None = None,
    patch_size: int | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
    fuse: bool | None = None,
) -> None:
    """Compare a training step, packed and as dense-and-mask: each module's output, each parameter's gradient.

    The step goes forward and backward once, on one random batch and from random gradients at the model's outputs, by
    the ``gather`` engine. ``model`` is not changed: all is done with float64 copies in training mode, with all
    parameters moved away from their initial values (a zero layer scale would hide an error) and random dropping
    switched off. No optimiser steps, and no other engine or dtype is looked at. Parameters that require no gradient
    are not compared.

    Args:
        model: a dense model, not sparsified yet.
        in_channels: channels of the input; None takes those of the first convolution.
        patch_size: pixels along a patch; the batch is ``(2, C, 2 * patch_size, 3 * patch_size)``. None tries
            32, then 64 and 128 if the strides of the model do not divide it.
        tolerance: largest accepted difference, relative to the largest value of an output or a gradient.
        seed: of input and parameters; the global random state is left alone.
        fuse: as `sparsify` has it; unless False, blocks are also compared with norms and activations in one.

    Raises:
        UnsupportedModuleError: naming the first module whose output differs, the last whose gradient does, or the
            one that backward fails in, also as a dense model.
        ValueError: if the dense model does not run on such an input.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    if parameter.is_meta:
        raise ValueError("the parity check needs real parameters; move the model off the meta device first")
    channels = _input_channels(model) if in_channels is None else in_channels
    sizes = (32, 64, 128) if patch_size is None else (patch_size,)
    devices = [parameter.device] if parameter.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        source = _perturbed_copy(model, seed)
        for size in sizes:
            x = torch.randn(2, channels, 2 * size, 3 * size, generator=torch.Generator().manual_seed(seed))
            try:
                _compare(source, x.to(parameter.device, torch.float64), tolerance, fuse is not False)
                return
            except _PatchTooSmallError as error:
                if size == sizes[-1]:
                    raise UnsupportedModuleError(error.path, error.module, str(error)) from error


_LOOKS_BEYOND = (
    "its forward looks beyond a patch; write that as modules that have a rule (nn.MaxPool2d, nn.AdaptiveAvgPool2d(1), "
    "...) or leave it out"
)
_DIFFERS_IN_ONE = "its norms and activations must not be one operator: sparsify(model, fuse=False)"


class _PatchTooSmallError(Exception):
    def __init__(self, path: str, module: nn.Module, message: str):
        super().__init__(message)
        self.path = path
        self.module = module


def _input_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError("the model holds no Conv2d to take the number of input channels from; pass in_channels")


def _perturbed_copy(model: nn.Module, seed: int) -> nn.Module:
    """Return a float64 copy in training mode, parameters moved off zero, with nothing left to chance."""
    clone = copy.deepcopy(model).double().train()
    generator = torch.Generator().manual_seed(seed)
    for parameter in clone.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        scale, offset = (0.4, 0.1) if parameter.dim() < 2 else (0.02, -0.01)
        parameter.add_((noise * scale + offset).to(parameter.device))
        parameter.grad = None
    for module in clone.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) or hasattr(module, "drop_prob"):
            module.eval()
    return clone


def _compare(source: nn.Module, x: Tensor, tolerance: float, fuse: bool) -> None:
    grid = PatchGrid.from_active(torch.tensor(_ACTIVE, dtype=torch.bool, device=x.device))
    apart, in_one = (_adopted(source, way) for way in (False, True))
    shown = set(dict(source.named_modules())) - _opaque(apart)
    reference, image = DenseAndMask(source, grid), x.clone().requires_grad_()
    with recording(reference.model, shown) as dense, torch.enable_grad():
        try:
            outputs = reference(image * grid.pixels(x.shape[2:]).unsqueeze(1), checkpointing=True)
        except Exception as error:
            raise ValueError(
                f"the dense model does not run on an input of {tuple(x.shape)} ({error}); call "
                f"patchsparse.testing.check_parity with the in_channels and patch_size that it takes"
            ) from error
    modules = dict(source.named_modules())
    step = _Step(reference.model, image, tensors_of(outputs), dense, modules, ", not even as a dense model")
    expected = _Expected(modules, dense, grid, tolerance, step)
    _check(apart, shown, x, expected, _LOOKS_BEYOND)
    if fuse:  # a hook on a norm or an activation would part them
        _check(in_one, _containers(in_one), x, expected, _DIFFERS_IN_ONE)


def _adopted(source: nn.Module, fuse: bool) -> nn.Module:
    candidate = copy.deepcopy(source)
    return adopt(candidate, plan_adoption(candidate, trust_forward=True), "gather", fuse)


def _check(candidate: nn.Module, shown: set[str], x: Tensor, expected: _Expected, remedy: str) -> None:
    """Take a step on packed ``x``; raise for the first of the modules ``shown`` that differs, or cannot run."""
    failure: Exception | None = None
    image, outputs, modules = x.clone().requires_grad_(), None, expected.modules
    with recording(candidate, shown) as packed, bind(candidate, expected.grid, checkpointing=True):
        try:
            with torch.enable_grad():
                outputs = candidate(pack(image, expected.grid))
        except Exception as error:  # the first difference below explains it better, if there is one
            failure = error
    _report_difference(packed, expected, remedy)
    if failure is not None:
        path = packed.running[-1][0] if packed.running else ""
        if "does not divide the patch" in str(failure):
            raise _PatchTooSmallError(path, modules[path], str(failure)) from failure
        reason = f"fails on packed patches: {_told(failure)}"
        raise UnsupportedModuleError(path, modules[path], reason) from failure
    ours = _Step(candidate, image, tensors_of(outputs), packed, modules, " on packed patches")
    _report_gradients(*expected.gradients(ours), expected)


def _containers(model: nn.Module) -> set[str]:
    """Return the path of the model and those of modules that call norms and activations in one."""
    return {""} | {path for path, module in model.named_modules() if isinstance(module, PatchContainer)}


def _opaque(model: nn.Module) -> set[str]:
    """Return the paths below modules that the reference runs in pieces: calls there have no counterpart."""
    roots = [p for p, m in model.named_modules() if isinstance(m, (PatchImageModule, _BATCH_NORM))]
    return {p for p, _ in model.named_modules() for root in roots if p.startswith(f"{root}.")}


def _report_difference(packed: Record, expected: _Expected, remedy: str) -> None:
    """Raise for the first call whose output differs; blame the caller where its input differs already."""
    dense, grid, tolerance = expected.dense, expected.grid, expected.tolerance
    for key, outputs in packed.outputs.items():
        error = _largest(outputs, dense.outputs.get(key), grid)
        if error <= tolerance:
            continue
        path, what = key[0], "output"
        if not _largest(packed.inputs[key], dense.inputs.get(key), grid) <= tolerance:
            path, what = packed.callers[key], f"call of '{key[0]}'"
        how = "has another shape than" if error == float("inf") else f"differs by {error:.1e} from"
        raise UnsupportedModuleError(
            path,
            expected.modules[path],
            f"its {what} on packed patches {how} dense-and-mask, so {remedy}",
        )


def _largest(ours: list[Tensor], theirs: list[Tensor] | None, grid: PatchGrid) -> float:
    if theirs is None or len(theirs) != len(ours):
        return float("inf")
    return max((_difference(a, b, grid) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(packed: Tensor, dense: Tensor, grid: PatchGrid) -> float:
    """Return the largest relative difference on active pixels, inf where the shapes do not fit."""
    return min((_relative(packed, other) for other in _counterparts(packed, dense, grid)), default=float("inf"))


def _counterparts(packed: Tensor, dense: Tensor, grid: PatchGrid) -> list[Tensor]:
    """Return what ``dense`` may be in the shape of ``packed``: as it is, or packed with channels first or last."""
    candidates = [dense] if packed.shape == dense.shape else []
    if dense.dim() == 4 and dense.shape[0] == grid.batch_size:
        for order in ((0, 1, 2, 3), (0, 3, 1, 2)):  # channels first, channels last
            image = dense.permute(order)
            if image.shape[2] % grid.shape[0] == 0 and image.shape[3] % grid.shape[1] == 0:
                inverse = [order.index(axis) for axis in range(4)]
                candidates.append(pack(image, grid).permute(inverse))
    return [other for other in candidates if other.shape == packed.shape]


def _counterpart(packed: Tensor, dense: Tensor, grid: PatchGrid) -> Tensor:
    """Return what ``dense`` is in the shape of ``packed``, to which it is equal in one way."""
    return min(_counterparts(packed, dense, grid), key=lambda other: _relative(packed.detach(), other.detach()))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else 1.0
    if ours.numel() == 0:
        return 0.0
    scale = theirs.abs().max().clamp(min=1e-30)
    error = float((ours - theirs).abs().max() / scale)
    return error if error == error else 1e300  # NaN is a difference


Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class _Step:
    """The first half of a training step of a model: what it made of ``image``; ``how`` is of the words of an error."""

    model: nn.Module
    image: Tensor
    outputs: list[Tensor]
    record: Record
    modules: dict[str, nn.Module]
    how: str

    def gradients(self, outputs: list[Tensor], directions: list[Tensor]) -> Gradients:
        """Return the gradients at the image ("") and all parameters, from ``directions`` at ``outputs``."""
        taken = [(o, d) for o, d in zip(outputs, directions, strict=True) if o.requires_grad]
        try:
            if taken:
                torch.autograd.backward([o for o, _ in taken], [d for _, d in taken])
        except Exception as error:
            path = self.record.reached
            reason = f"it cannot be trained{self.how}: {_told(error)}"
            raise UnsupportedModuleError(path, self.modules[path], reason) from error
        parameters = self.model.named_parameters()
        return {"": self.image.grad, **{name: p.grad for name, p in parameters if p.requires_grad}}


@dataclass
class _Expected:
    """What dense-and-mask returned, and the modules of the dense model by path."""

    modules: dict[str, nn.Module]
    dense: Record
    grid: PatchGrid
    tolerance: float
    step: _Step
    known: Gradients = field(default_factory=dict)
    directions: list[Tensor] = field(default_factory=list)

    def gradients(self, ours: _Step) -> tuple[Gradients, Gradients]:
        """Return the gradients of a step on packed patches, and those of the same step as dense-and-mask."""
        if not self.known:
            generator = torch.Generator().manual_seed(0)
            shapes = [output.shape for output in ours.outputs]
            draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            self.directions = [draw.to(self.step.image.device) for draw in draws]
            with torch.enable_grad():
                pairs = zip(ours.outputs, self.step.outputs, strict=True)
                theirs = [
                    min(_counterparts(a, b, self.grid), key=lambda c, a=a: _relative(a.detach(), c.detach()))
                    for a, b in pairs
                ]
            self.known = self.step.gradients(theirs, self.directions)
        return ours.gradients(ours.outputs, self.directions), self.known


def _report_gradients(ours: Gradients, theirs: Gradients, expected: _Expected) -> None:
    """Raise for the last of the parameters whose gradient differs: what comes before it may suffer from it."""
    largest = max((float(g.abs().max()) for g in theirs.values() if g is not None and g.numel()), default=0.0)
    for name in reversed(theirs):
        own, other = ours[name], theirs[name]
        present = other if own is None else own
        if present is None or not present.numel():
            continue
        own, other = (torch.zeros_like(present) if g is None else g for g in (own, other))
        error = float((own - other).abs().max()) / max(float(other.abs().max()), 1e-4 * largest, 1e-30)
        if error <= expected.tolerance:
            continue
        path, _, last = name.rpartition(".")
        what = f"the gradient of its {last}" if name else "the gradient at its input"
        raise UnsupportedModuleError(
            path,
            expected.modules[path],
            f"{what} on packed patches differs by {error:.1e} from dense-and-mask though the outputs agree: a backward "
            "of its own, here or behind it, looks beyond a patch; write that with PyTorch's own operations",
        )


def _told(error: Exception) -> str:
    """Return what an error says, without hints that do not help here, and the remedy if it names a known cause."""
    text = str(error).partition(" Hint:")[0].strip().rstrip(".")
    in_place = "in-place" in text or "inplace" in text
    return f"{text}; let it compute out of place (inplace=False, x + y for x += y)" if in_place else text
