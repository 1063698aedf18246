"""The ways of taking a training step, and the checks that they train the same model before any of them is timed.

=====================  =============================================================================================
``published``          dense-and-mask, NCHW, eager, LAMB per parameter, whole image decoded; float32 (TF32 on a GPU)
``dense``              the best dense step of our own: whole images, channels_last, masking for free (`rivals.py`)
``exact``              ours: packed encoder, exact decoder
``sparse``             ours, sparse decoding as in the presets ``nl50-*-fast``
``light``              ours, light decoder
=====================  =============================================================================================

``WAY compiled`` is the same with its model compiled, ``WAY graph`` with its whole step captured. Ours and ``dense`` run
in bfloat16 on a GPU, in float32 on a CPU. Sparse decoding and the light decoder train other objectives, which
docs/decoding.md compares by what they learn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, pack
from patchsparse.precision import exact_float32
from patchsparse.testing import DenseAndMask
from spatspark_fast.data.augment import Augmentation
from spatspark_fast.models.choices import DECODE_RATIO
from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.patch_loss import patch_errors, reconstruction_loss
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import SparK
from spatspark_fast.training.lamb import clip_gradients

from ..measure.scales import MASKED, Scale
from ..measure.timing import GATE, said
from .captured_steps import GraphStep
from .rivals import DenseStep, Published, PublishedStep
from .steps import OurStep, Step, build, compiled, no_mark, windows_on

__all__ = ["OURS", "RIVALS", "WAYS", "case_of", "check_equal", "forget", "make_step"]

OURS = ("exact", "sparse", "light")
RIVALS = ("published", "dense")
WAYS = (*RIVALS, *OURS)
CHECKED = 8  # images of a batch that are compared, at most
LOSS, GRADIENT = 1e-4, 1e-3  # relative differences up to which two ways count as the same
Measured = tuple[float, float]  # a loss, and the norm of its gradient


def case_of(encoder: str, scale: Scale) -> str:
    """Return the name of a case for tables."""
    return f"{encoder} {scale.size}x{scale.size}x{scale.frames} batch {scale.batch}"


def make_step(way: str, encoder: str, scale: Scale, precision: torch.dtype | None = None) -> Step:
    """Build a step on windows in memory; equal weights and masks in all ways that share a decoder.

    Args:
        way: its name; ``" compiled"`` behind it compiles the model, ``" graph"`` captures the step.
        encoder: timm's name.
        scale: sizes.
        precision: of ours and of ``dense``; that of the scale by default.
    """
    way, _, how = way.partition(" ")
    masks, device = MaskSampler(ratio=MASKED), scale.device
    place = windows_on(device, scale.batch, scale.size, scale.frames, Augmentation())
    decoder, width = ("light", scale.light) if way == "light" else ("unet", scale.width)
    model = build(decoder, width, device, encoder, scale.frames)
    if way == "published":
        (frames,) = place.batches([[(0, index) for index in range(scale.batch)]])
        return PublishedStep(Published(model, encoder, masks(frames, step=0)), frames, masks)
    kind = DenseStep if way == "dense" else OurStep
    if way == "dense":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ratio = DECODE_RATIO if way == "sparse" else 1.0
    step = kind(model, place, scale.batch, masks, ratio, scale.precision if precision is None else precision)
    return {"": lambda step: step, "compiled": compiled, "graph": GraphStep}[how](step)


def check_equal(encoder: str, scale: Scale) -> dict[str, str]:
    """Open the gate for the ways that train the same, in float32; return how far the others differ.

    ``exact`` must have the loss and gradient of ``published``, ``dense`` those of ``exact`` with everything visible,
    and ``light`` those of the same model on the features of a dense-and-mask encoder. ``sparse`` must have those of
    the same patches in a whole image, with norms at rest, since a region has other batch statistics. What was
    compared once in a process counts for all its benchmarks.

    Raises:
        AssertionError: if ``exact`` differs, which all figures are compared by.
    """
    wrong: dict[str, str] = {}
    for what, error, limit in _differences(encoder, replace(scale, batch=min(scale.batch, CHECKED))):
        way = re.split("[,:]", what)[0]
        if way == "exact" or error <= limit:
            GATE.let(f"{encoder} {what}", error, limit)
        else:
            wrong[way] = f"{what} differs by {error:.2e} (limit {limit:.0e}); no figure is given"
    return wrong


def forget() -> None:
    """Forget what was compared in this process, so that it is compared again."""
    _differences.cache_clear()


@cache
def _differences(encoder: str, scale: Scale) -> list[tuple[str, float, float]]:
    """Return what was compared, how far it differs relatively, and how far it may."""
    ways: dict[str, Callable[[], tuple[Measured, Measured]]] = {
        "exact": lambda: (_exact(encoder, scale), _published(encoder, scale)),
        "dense, all visible": lambda: (_visible("dense", encoder, scale), _visible("exact", encoder, scale)),
        "sparse": lambda: _sparse(encoder, scale),
        "light": lambda: _light(encoder, scale),
    }
    found = []
    for way, compare in ways.items():
        with exact_float32(), said(f"compared: {way}"):
            found.append((way, *compare()))
    return [
        (f"{way}: {what}", abs(own - other) / max(abs(other), 1e-30), limit)
        for way, owns, others in found
        for what, limit, own, other in zip(("loss", "gradient"), (LOSS, GRADIENT), owns, others, strict=True)
    ]


def _loss_and_norm(loss: Tensor, *modules: nn.Module) -> tuple[float, float]:
    """Return a loss and the norm of its gradient at the parameters of some modules."""
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return float(loss.detach()), float(clip_gradients(parameters, None))


def _published(encoder: str, scale: Scale) -> tuple[float, float]:
    step = make_step("published", encoder, scale)
    return _loss_and_norm(step.loss(), step.model)


def _exact(encoder: str, scale: Scale) -> tuple[float, float]:
    step = make_step("exact", encoder, scale, torch.float32)
    return _loss_and_norm(step.loss(), step.model)


def _visible(way: str, encoder: str, scale: Scale) -> tuple[float, float]:
    """Return loss and norm with every patch visible; the loss is that of all patches."""
    step = make_step(way, encoder, scale, torch.float32)
    step.model.loss_on = "all"
    step.masks = MaskSampler(ratio=0.0)
    frames = next(step.frames)
    return _loss_and_norm(step.run(frames, step.masks(frames, step=1), None, no_mark), step.model)


def _sparse(encoder: str, scale: Scale) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return loss and norm of a region, and of the same patches of whole images that are decoded exactly."""
    step = make_step("sparse", encoder, scale, torch.float32)
    model: SparK = step.model.eval()
    frames = next(step.frames)
    grid, region = masks_of_step(model, step.masks, frames, DECODE_RATIO, step=1)
    own = _loss_and_norm(model(frames, grid, region).loss, model)
    assert isinstance(region, Region)
    inside = torch.zeros_like(grid.active)
    for image, (row, column) in zip(inside, region.first.tolist(), strict=True):
        image[row : row + region.shape[0], column : column + region.shape[1]] = True
    counted = inside & ~grid.active
    errors = patch_errors(model(frames, grid).prediction, frames, grid.shape)
    return own, _loss_and_norm((errors * counted).sum() / counted.sum(), model)


def _light(encoder: str, scale: Scale) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return loss and norm of ours, and of the same model with a dense-and-mask encoder."""
    step = make_step("light", encoder, scale, torch.float32)
    model: SparK = step.model
    frames = next(step.frames)
    grid: PatchGrid = step.masks(frames, step=1)
    masking = DenseAndMask(model.encoder, grid)
    own = _loss_and_norm(model(frames, grid).loss, model)
    densified = model.densify([pack(f, grid) for f in masking(frames)], grid)
    other = reconstruction_loss(model.decoder(densified), frames, grid, model.loss_on)
    return own, _loss_and_norm(other, masking, model.densify, model.decoder)
