"""sparsify(verify=True) takes a training step: who cannot be trained is refused by name, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchsparse import UnsupportedModuleError, sparsify
from patchsparse.testing import check_parity


class _PerRow(torch.autograd.Function):
    """The identity, whose gradient depends on the number of rows: images when dense, patches when packed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / grads[0].shape[0]


class _FailsPacked(torch.autograd.Function):
    """The identity, whose gradient is there for two images alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if grads[0].shape[0] != 2:
            raise RuntimeError("two rows are wanted")
        return grads[0]


class Pixelwise(nn.Module):
    """A module of a user's own that says it treats each pixel by itself, as its forward does."""

    patchsparse_pointwise = True

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "overwrites what is saved":
            y = x.sigmoid()
            return y.mul_(2) * y
        if self.kind == "overwrites later":
            return x.exp().add_(1)
        result: Any = {"per row": _PerRow, "fails": _FailsPacked}[self.kind].apply(x)
        return result


def model_of(kind: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), Pixelwise(kind)), nn.ReLU()
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("overwrites later", r"'2\.1' \(.*Pixelwise\): it cannot be trained, not even.*in-?place.*out of place"),
        ("overwrites what is saved", r"'2\.1' \(.*Pixelwise\): it cannot be trained, not even.*out of place"),
        ("per row", r"'2\.0' \(.*Conv2d\): the gradient of its bias.*differs.*backward of its own"),
        ("fails", r"'2\.1' \(.*Pixelwise\): it cannot be trained on packed patches: two rows are wanted"),
    ],
)
def test_who_cannot_be_trained_is_refused_by_name(kind: str, message: str) -> None:
    model = model_of(kind)
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModuleError, match=message):
        sparsify(model, verify=True)
    assert [type(module) for module in model.modules()] == before


class Saving(nn.Module):
    """Checkpoints its layers itself, in a way that ``bind`` is not told of."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Any = checkpoint(self.layers, x, use_reentrant=self.reentrant)
        return result


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_recomputes_is_verified(reentrant: bool) -> None:
    check_parity(nn.Sequential(Saving(reentrant), nn.Conv2d(4, 4, 3, padding=1)))


def test_a_frozen_model_and_one_without_gradients_are_verified() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)).requires_grad_(False)
    check_parity(model)

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    check_parity(Detached())


def test_nothing_is_left_behind() -> None:
    model = timm.create_model("resnet10t", in_chans=2, features_only=True).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_parity(model)
    assert torch.equal(torch.rand(3), expected)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.ones_like(parameter))  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


MODELS = ("vgg11", "nfnet_l0", "vgg11_bn", "resnet18", "convnextv2_atto", "regnety_002", "efficientnet_b0", "dla34")


@pytest.mark.rest
@pytest.mark.parametrize("name", MODELS)
def test_timm_models_are_verified(name: str) -> None:
    sparsify(timm.create_model(name, in_chans=1, features_only=True), verify=True)
