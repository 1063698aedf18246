"""The parity check behind ``sparsify(model, verify=True)``: packed against dense-and-mask."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..grid import PatchGrid
from ..packing import pack
from .adopt import UnsupportedModuleError, adopt, plan_adoption
from .binding import bind
from .dense_and_mask import DenseAndMask
from .fused import PatchContainer
from .modules import PatchImageModule

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
    """Compare the output of every module, packed and as dense-and-mask, on one random batch.

    ``model`` is not changed: both runs use float64 copies in training mode, with all parameters moved away
    from their initial values (a zero layer scale would hide an error) and random dropping switched off.

    Args:
        model: a dense model, not sparsified yet.
        in_channels: channels of the input; None takes those of the first convolution.
        patch_size: pixels along a patch; the batch is ``(2, C, 2 * patch_size, 3 * patch_size)``. None tries
            32, then 64 and 128 if the strides of the model do not divide it.
        tolerance: largest accepted difference, relative to the largest value of an output.
        seed: of input and parameters; the global random state is left alone.
        fuse: as `sparsify` has it; unless False, blocks are also compared with norms and activations in one.

    Raises:
        UnsupportedModuleError: naming the first module whose output differs.
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
    for module in clone.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) or hasattr(module, "drop_prob"):
            module.eval()
    return clone


def _compare(source: nn.Module, x: Tensor, tolerance: float, fuse: bool) -> None:
    grid = PatchGrid.from_active(torch.tensor(_ACTIVE, dtype=torch.bool, device=x.device))
    apart, in_one = (_adopted(source, way) for way in (False, True))
    shown = set(dict(source.named_modules())) - _opaque(apart)
    reference = DenseAndMask(source, grid)
    with _recording(reference.model, shown) as dense:
        try:
            reference(x * grid.pixels(x.shape[2:]).unsqueeze(1))
        except Exception as error:
            raise ValueError(
                f"the dense model does not run on an input of {tuple(x.shape)} ({error}); call "
                f"patchsparse.testing.check_parity with the in_channels and patch_size that it takes"
            ) from error
    expected = _Expected(dict(source.named_modules()), dense, grid, tolerance)
    _check(apart, shown, pack(x, grid), expected, _LOOKS_BEYOND)
    if fuse:  # a hook on a norm or an activation would part them
        _check(in_one, _containers(in_one), pack(x, grid), expected, _DIFFERS_IN_ONE)


def _adopted(source: nn.Module, fuse: bool) -> nn.Module:
    candidate = copy.deepcopy(source)
    return adopt(candidate, plan_adoption(candidate, trust_forward=True), "gather", fuse)


def _check(candidate: nn.Module, shown: set[str], x: Tensor, expected: _Expected, remedy: str) -> None:
    """Run ``candidate`` on packed ``x``; raise for the first of the modules ``shown`` that differs, or cannot run."""
    failure: Exception | None = None
    with _recording(candidate, shown) as packed, bind(candidate, expected.grid, checkpointing=False):
        try:
            candidate(x)
        except Exception as error:  # the first difference below explains it better, if there is one
            failure = error
    _report_difference(packed, expected, remedy)
    if failure is not None:
        path = packed.running[-1][0] if packed.running else ""
        if "does not divide the patch" in str(failure):
            raise _PatchTooSmallError(path, expected.modules[path], str(failure)) from failure
        raise UnsupportedModuleError(path, expected.modules[path], f"fails on packed patches: {failure}") from failure


def _containers(model: nn.Module) -> set[str]:
    """Return the path of the model and those of modules that call norms and activations in one."""
    return {""} | {path for path, module in model.named_modules() if isinstance(module, PatchContainer)}


def _opaque(model: nn.Module) -> set[str]:
    """Return the paths below modules that the reference runs in pieces: calls there have no counterpart."""
    roots = [p for p, m in model.named_modules() if isinstance(m, (PatchImageModule, _BATCH_NORM))]
    return {p for p, _ in model.named_modules() for root in roots if p.startswith(f"{root}.")}


def _report_difference(packed: _Record, expected: _Expected, remedy: str) -> None:
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
    candidates = [dense] if packed.shape == dense.shape else []
    if dense.dim() == 4 and dense.shape[0] == grid.batch_size:
        for order in ((0, 1, 2, 3), (0, 3, 1, 2)):  # channels first, channels last
            image = dense.permute(order)
            if image.shape[2] % grid.shape[0] == 0 and image.shape[3] % grid.shape[1] == 0:
                inverse = [order.index(axis) for axis in range(4)]
                candidates.append(pack(image, grid).permute(inverse))
    errors = [_relative(packed, other) for other in candidates if other.shape == packed.shape]
    return min(errors, default=float("inf"))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else 1.0
    if ours.numel() == 0:
        return 0.0
    scale = theirs.abs().max().clamp(min=1e-30)
    error = float((ours - theirs).abs().max() / scale)
    return error if error == error else 1e300  # NaN is a difference


@dataclass
class _Record:
    """Inputs and outputs of every call, in order of completion, and the calls that are still running."""

    outputs: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    inputs: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    callers: dict[tuple[str, int], str] = field(default_factory=dict)
    running: list[tuple[str, int]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def start(self, path: str, module: nn.Module, args: Any) -> None:
        """Note that a module begins, and on what."""
        call = self.calls[path] = self.calls.get(path, -1) + 1
        self.callers[path, call] = self.running[-1][0] if self.running else path
        self.inputs[path, call] = _tensors(args)
        self.running.append((path, call))

    def end(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Keep its output."""
        self.outputs[self.running.pop()] = _tensors(output)


@dataclass(frozen=True)
class _Expected:
    """What dense-and-mask returned, and the modules of the dense model by path."""

    modules: dict[str, nn.Module]
    dense: _Record
    grid: PatchGrid
    tolerance: float


def _tensors(tree: Any) -> list[Tensor]:
    """Return copies of the tensors in ``tree``: a later in-place operation must not change them."""
    return [leaf.clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _recording(model: nn.Module, shown: set[str]) -> Iterator[_Record]:
    record = _Record()
    handles = []
    for path, module in model.named_modules():
        if path in shown:
            handles.append(module.register_forward_pre_hook(partial(record.start, path)))
            handles.append(module.register_forward_hook(partial(record.end, path)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
