"""What the sparsify tests share: encoders, grids, and a comparison with the dense-masked reference."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack, sparsify

from .dense_masked import DenseMasked

UNEQUAL = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 1, 0], [0, 0, 1]]], dtype=torch.bool)


def encoder(name: str, in_chans: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    """Return a float64 feature extractor in training mode whose zero-initialised scales have been moved."""
    torch.manual_seed(seed)
    options = {"features_only": True, **options}
    model = timm.create_model(name, pretrained=False, in_chans=in_chans, **options).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5 + 0.1)
    return model


def images(active: Tensor, patch: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal noise ``(B, channels, Gh * patch, Gw * patch)``."""
    batch, rows, columns = active.shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, rows * patch, columns * patch, generator=generator, dtype=dtype)


def loss_of(features: list[Tensor]) -> Tensor:
    """Weigh packed features at random and alike for equal shapes, so that every output matters."""
    generator = torch.Generator().manual_seed(2)
    parts = [(f * torch.randn(f.shape, generator=generator, dtype=f.dtype)).mean() / f.detach().std() for f in features]
    return torch.stack(parts).sum()


def as_list(output: Any) -> list[Tensor]:
    """Return a list of feature maps, also for a single one."""
    return list(output) if isinstance(output, (list, tuple)) else [output]


def assert_close(ours: Tensor, theirs: Tensor, scale: float, what: str, tolerance: float = 1e-9) -> None:
    """Fail unless the largest difference is below ``tolerance`` times the larger of ``scale`` and the values."""
    size = max(float(theirs.detach().abs().max()) if theirs.numel() else 0.0, scale)
    error = float((ours - theirs).detach().abs().max()) if theirs.numel() else 0.0
    assert error <= tolerance * size, f"{what}: error {error:.2e} at size {size:.2e}"


def assert_parity(
    model: nn.Module, active: Tensor, patch: int, channels: int = 3, seed: int = 3, fuse: bool | None = None
) -> None:
    """Compare features, input and parameter gradients and buffers with the reference; sparsifies ``model``."""
    reference = DenseMasked(model)
    sparsify(model, fuse=fuse)
    grid = PatchGrid.from_active(active)
    x = images(active, patch, channels)
    x_ref, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(seed)
    expected = [pack(f, grid) for f in as_list(reference(x_ref, active))]
    torch.manual_seed(seed)
    with bind(model, grid):
        features = as_list(model(pack(x_ours, grid)))
    assert len(expected) == len(features)
    for level, (ours, theirs) in enumerate(zip(features, expected, strict=True)):
        assert_close(ours, theirs, 0.0, f"feature {level}")
    loss_of(expected).backward()
    loss_of(features).backward()
    assert_same_gradients(model, reference.model)
    assert x_ours.grad is not None
    assert x_ref.grad is not None
    assert_close(x_ours.grad, x_ref.grad, 0.0, "input gradient")
    for (name, ours), theirs in zip(model.named_buffers(), reference.model.buffers(), strict=True):
        assert_close(ours, theirs, 0.0, name)


def assert_same_gradients(model: nn.Module, reference: nn.Module, tolerance: float = 1e-9) -> None:
    """Compare all gradients; one that is analytically zero (a bias before a norm) is rounding of the largest."""
    pairs = [
        (name, p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
    ]
    largest = max(float(theirs.abs().max()) for _, _, theirs in pairs if theirs is not None)
    for name, ours, theirs in pairs:
        if theirs is None:
            assert ours is None, name
        else:
            assert ours is not None, name
            assert_close(ours, theirs, 1e-4 * largest, name, tolerance)
