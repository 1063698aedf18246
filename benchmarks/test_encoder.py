"""A whole encoder, forward + backward, 288x288x12 float32: packed against dense-and-mask and against plain dense.

Plain dense is the honest rival: it convolves the whole image once and gets the masking for free.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, available_backends, bind, pack, sparsify
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


CASES = [
    ("resnet18", "gather", 0.6),
    *((name, "auto", masked) for name in ("resnet18", "resnet50", "convnext_tiny") for masked in (0.3, 0.6, 0.75)),
]


@pytest.mark.parametrize(("name", "backend", "masked"), CASES)
def test_encoder(benchmark, record, name, backend, masked):
    steps, parity = ways(name, backend, masked)
    parity()
    if name == "convnext_tiny":  # its LayerNorm needs no mask, so that SparK's way is plain dense with products
        del steps["dense-and-mask"]
    timing = in_turn(steps, rounds=7 if name == "resnet18" else 5, warmup=1)
    for rival in (way for way in steps if way != "packed"):
        medians = (timing.median("packed"), timing.median(rival))
        case = f"{name} {backend} {masked:.0%} masked batch {BATCH}"
        record("encoder", case, "packed", rival, timing.ratio(rival, "packed"), medians, "s")
    benchmark.pedantic(steps["packed"], rounds=1)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ engine was not built")
def test_cpp_against_gather(benchmark, record):
    gather, parity = ways("resnet18", "gather", 0.6)
    cpp, parity_cpp = ways("resnet18", "cpp", 0.6)
    parity()
    parity_cpp()
    timing = in_turn({"gather": gather["packed"], "cpp": cpp["packed"]})
    medians = (timing.median("cpp"), timing.median("gather"))
    case = f"resnet18 60% masked batch {BATCH}"
    record("encoder", case, "cpp", "gather", timing.ratio("gather", "cpp"), medians, "s")
    benchmark.pedantic(cpp["packed"], rounds=1)


@pytest.mark.parametrize("backend", ["gather", "auto"])
def test_memory_of_resnet18_activations(benchmark, record, backend):
    """Peak bytes of a step above the parameters and their gradients, shared by all ways; 32 of 81 patches visible."""
    steps, parity = ways("resnet18", backend, 0.6)
    parity()
    for step in steps.values():
        step()  # allocate the weight gradients, which stay
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    benchmark.pedantic(steps["packed"], rounds=1)
    for rival in ("dense-and-mask", "dense"):
        ratio = peaks[rival] / peaks["packed"]
        values = (peaks["packed"] / 2**20, peaks[rival] / 2**20)
        case = f"resnet18 {backend} 60% masked batch {BATCH}"
        record("memory", case, "packed", rival, Ratio(ratio, ratio, ratio), values, "MiB")
