"""A whole encoder, forward + backward, 288x288x12 float32: packed against dense-and-mask and against plain dense.

Plain dense is the honest rival: it convolves the whole image once and gets the masking for free.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack, sparsify
from spatspark_fast.training.savings import DenseAndMask

from .timing import Ratio, check_parity, in_turn, peak_bytes

BATCH, SIZE, FRAMES, PATCH = 4, 288, 12, 32


def build(name: str, backend: str) -> tuple[nn.Module, nn.Module]:
    """Return a packed encoder and its plain dense twin in channels_last, with equal weights."""
    torch.manual_seed(0)
    dense = timm.create_model(name, in_chans=FRAMES, features_only=True).train()
    dense = dense.to(memory_format=torch.channels_last)
    return sparsify(copy.deepcopy(dense), backend=backend), dense


def backward(features: list[Tensor]) -> None:
    """Send a gradient of ones through every feature map."""
    torch.autograd.backward(list(features), [torch.ones_like(f) for f in features])


def ways(name: str, backend: str, masked: float, batch: int = BATCH):
    """Return the steps to compare, as functions that run forward + backward, and a parity check."""
    packed_model, dense_model = build(name, backend)
    side = SIZE // PATCH
    grid = PatchGrid.random(batch, (side, side), 1 - masked, generator=torch.Generator().manual_seed(0))
    frames = torch.randn(batch, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    frames_last = frames.contiguous(memory_format=torch.channels_last)
    masked_model = DenseAndMask(dense_model, grid).train().to(memory_format=torch.contiguous_format)

    def packed() -> list[Tensor]:
        with bind(packed_model, grid):
            return packed_model(pack(frames_last, grid))

    def parity() -> None:
        for p, m in zip(packed(), masked_model(frames), strict=True):
            check_parity(f"{name} {backend}", p.detach(), pack(m.detach(), grid), 1e-4)

    steps = {
        "packed": lambda: backward(packed()),
        "dense": lambda: backward(dense_model(frames_last)),
        "dense-and-mask": lambda: backward(masked_model(frames)),
    }
    return steps, parity


@pytest.mark.parametrize("masked", [0.6])
def test_resnet18_with_gather_alone(benchmark, record, masked):
    steps, parity = ways("resnet18", "gather", masked)
    parity()
    timing = in_turn(steps)
    case = f"resnet18 gather {masked:.0%} masked batch {BATCH}"
    for rival in ("dense-and-mask", "dense"):
        medians = (timing.median("packed"), timing.median(rival))
        record("encoder", case, "packed", rival, timing.ratio(rival, "packed"), medians, "s")
    benchmark.pedantic(steps["packed"], rounds=3)


def test_memory_of_resnet18_activations(benchmark, record):
    """Peak bytes of a step above the parameters and their gradients, which all ways share."""
    steps, parity = ways("resnet18", "gather", 0.6)
    parity()
    for step in steps.values():
        step()  # allocate the weight gradients, which stay
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    benchmark.pedantic(steps["packed"], rounds=1)
    for rival in ("dense-and-mask", "dense"):
        ratio = peaks[rival] / peaks["packed"]
        values = (peaks["packed"] / 2**20, peaks[rival] / 2**20)
        record(
            "memory",
            f"resnet18 gather 60% masked batch {BATCH}",
            "packed",
            rival,
            Ratio(ratio, ratio, ratio),
            values,
            "MiB",
        )
