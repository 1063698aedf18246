"""One level brought back to whole images: the fused operator that GPUs take against norm and ``unpack`` in turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from patchsparse import PatchGrid, patch_batch_norm_unpack
from spatspark_fast.models import densify
from spatspark_fast.models.densify import DensifyLevel, NormKind


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fused_level_equals_norm_then_unpack(
    monkeypatch: pytest.MonkeyPatch, training: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = DensifyLevel(6, 8, 3, "batch").train(training)
    for name, tensor in plain.state_dict().items():
        if name in ("norm.weight", "norm.bias", "norm.running_mean", "mask_token"):
            tensor.normal_()
    plain = plain.double() if dtype == torch.float64 else plain
    fused = copy.deepcopy(plain)
    monkeypatch.setattr(fused, "_fuses", lambda _: True)
    grid = PatchGrid.random(3, (3, 4), 5)
    packed = torch.randn(grid.num_active, 6, 2, 2).to(dtype)
    results = []
    for level in (plain, fused):
        features = packed.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for _ in range(2):
                level(features, grid, backend="auto")  # running statistics of several batches
            y = level(features, grid, backend="auto")
        y.float().square().mean().backward()
        gradients = [features.grad, *(p.grad for p in level.parameters())]
        results.append([y, *gradients, *level.buffers()])
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert int(fused.state_dict()["norm.num_batches_tracked"]) == (3 if training else 0)
    rtol, atol = (1e-6, 1e-9) if dtype == torch.float64 else (2e-2, 2e-2)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_layer_norm_and_dense_maps_keep_their_own_way(monkeypatch: pytest.MonkeyPatch, norm: NormKind) -> None:
    level = DensifyLevel(6, 8, 1, norm)
    grid = PatchGrid.random(2, (2, 2), 3)
    packed, image = torch.randn(6, 6, 2, 2), torch.randn(2, 6, 4, 4)
    expected = level(packed, grid), level(image)
    monkeypatch.setattr(level, "_fuses", lambda _: norm == "batch" or pytest.fail("asked for layer norm"))
    torch.testing.assert_close(level(packed, grid, backend="auto"), expected[0])
    torch.testing.assert_close(level(image, backend="auto"), expected[1])


def test_the_backend_reaches_the_fused_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    level = DensifyLevel(6, 8, 1, "batch")
    grid = PatchGrid.random(2, (2, 2), 3)
    packed = torch.randn(6, 6, 2, 2)
    asked = []

    def spy(*args: Any, **counted: Any) -> torch.Tensor:
        asked.append(args[-1])
        return patch_batch_norm_unpack(*args, **counted)

    monkeypatch.setattr(level, "_fuses", lambda _: True)
    monkeypatch.setattr(densify, "patch_batch_norm_unpack", spy)
    for backend in ("auto", "gather", "dense"):
        level(packed, grid, backend=backend)
    assert asked == ["auto", "gather"]  # "dense" keeps to PyTorch's layers
