"""Shared pieces of the parity tests: cases, weights, measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchsparse import PatchGrid
from spatspark_fast.models.choices import DecoderKind, LossOn
from spatspark_fast.models.spark import SparK, build_spark

from .reference_spark import ReferenceSparK

IN_CHANS = 3
WIDTH = 64


class Case(NamedTuple):
    encoder: str
    decoder: DecoderKind
    loss_on: LossOn
    patch: int = 32
    levels: int = 4


class Pair(NamedTuple):
    ours: SparK
    reference: ReferenceSparK


def make_pair(case: Case, backend: str, dtype: torch.dtype = torch.float64) -> Pair:
    """Build both models with one set of weights, none at a value that hides a layer (0 or 1e-6)."""
    torch.manual_seed(0)
    ours = build_spark(
        case.encoder,
        IN_CHANS,
        case.patch,
        case.decoder,
        WIDTH,
        case.loss_on,
        backend=backend,
        levels=case.levels,
    )
    scramble(ours)
    strides = (4, 8, 16, 32)[: case.levels]
    reference = ReferenceSparK(case.encoder, IN_CHANS, case.decoder, WIDTH, case.loss_on, strides)
    reference.load_state_dict(ours.state_dict())
    return Pair(ours.to(dtype).train(), reference.to(dtype).train())


def scramble(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))


def make_frames(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    """Return frames with dry areas, as radar has: ``(B, IN_CHANS, H, W)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, IN_CHANS, height, width, generator=generator, dtype=torch.float64)
    return noise.clamp(min=0).to(dtype)


def unequal_grid() -> PatchGrid:
    """Return a 2x3 grid for four images with 3, 2, 5 and 1 visible patches."""
    active = torch.tensor(
        [[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 0, 1]], [[1, 1, 1], [0, 1, 1]], [[0, 0, 1], [0, 0, 0]]]
    )
    return PatchGrid.from_active(active.bool())


def relative_error(ours: Tensor, reference: Tensor, floor: float = 1e-300) -> float:
    """Return the largest difference in units of the reference's largest value, or of ``floor``."""
    scale = max(reference.abs().max().item(), floor)
    return (ours - reference).abs().max().item() / scale


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter's gradient by name; a parameter without one yields zeros."""
    for name, parameter in model.named_parameters():
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
