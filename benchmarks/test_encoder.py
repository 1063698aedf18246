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

from .timing import check_parity, in_turn, peak_bytes

BATCH, SIZE, FRAMES, PATCH = 4, 288, 12, 32


def build(name: str, backend: str) -> tuple[nn.Module, nn.Module]:
    """Return a packed encoder and its plain dense twin in channels_last, with equal weights."""
    torch.manual_seed(0)
    dense = timm.create_model(name, in_chans=FRAMES, features_only=True).train()
    dense = dense.to(memory_format=torch.channels_last)
    return sparsify(copy.deepcopy(dense), backend=backend), dense


def backward(features: list[Tensor]) -> None:
    """Send a gradient of ones through every feature map."""
    torch.autograd.backward([f for f in features], [torch.ones_like(f) for f in features])


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
    record("encoder", case, timing, "packed", "dense-and-mask")
    record("encoder", case, timing, "packed", "dense")
    benchmark.pedantic(steps["packed"], rounds=3)
    benchmark.extra_info["over dense-and-mask"] = str(timing.ratio("dense-and-mask", "packed"))
    benchmark.extra_info["over dense"] = str(timing.ratio("dense", "packed"))


def test_memory_of_resnet18_activations(benchmark):
    """Peak bytes of the step without parameters and their gradients, which all ways share."""
    steps, parity = ways("resnet18", "gather", 0.6)
    parity()
    for step in steps.values():
        step()  # allocate the weight gradients, which stay
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    benchmark.pedantic(steps["packed"], rounds=1)
    benchmark.extra_info.update({f"{name} MiB": peak / 2**20 for name, peak in peaks.items()})
    benchmark.extra_info["share of dense"] = peaks["packed"] / peaks["dense"]
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()})
