"""Linear layers on packed patches in channels-last shape: by the C++ engine where PyTorch's products are slow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, sparsify
from patchsparse.adoption.modules import PatchLinear
from patchsparse.backends import choose, cpp
from patchsparse.backends.cpp import choice, library
from patchsparse.geometry import POINT
from patchsparse.pointwise import conv_call, linear_call, local_linear

engine = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))


def gradients(y: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(y, leaves, direction.to(y))


@engine
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "inputs", "outputs"), [(1, 768, 300), (2, 70, 16), (8, 16, 65)])
def test_the_product_of_the_engine_is_that_of_pytorch(size, inputs, outputs, bias, monkeypatch):
    called = []
    original = cpp.conv2d
    monkeypatch.setattr(choice, "products_are_slow", lambda: True)
    monkeypatch.setattr(cpp, "conv2d", lambda *args: called.append(1) or original(*args))
    x = torch.randn(9, size, size, inputs, requires_grad=True)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).requires_grad_()
    added = torch.randn(outputs, requires_grad=True) if bias else None
    leaves = (x, weight) if added is None else (x, weight, added)
    actual = local_linear(x, weight, added)
    assert called
    assert actual.is_contiguous()
    wide = tuple(t.detach().double().requires_grad_() for t in leaves)
    expected = F.linear(*wide)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for a, e in zip(gradients(actual, leaves), gradients(expected, wide), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_with_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(choice, "products_are_slow", lambda: True)
    x, weight = torch.randn(5, 2, 2, 32).to(dtype), torch.randn(8, 32).to(dtype)
    assert torch.equal(local_linear(x, weight, None), F.linear(x, weight))


def test_only_the_cpu_asks_the_engine(monkeypatch):
    monkeypatch.setattr(choice, "products_are_slow", lambda: True)
    for device, engine in (("meta", "gather"), ("cpu", "cpp" if library.load().problem is None else "gather")):
        x, weight = torch.empty(5, 2, 2, 32, device=device), torch.empty(8, 32, device=device)
        assert choose(linear_call(x, weight), "auto") == engine
        packed, square = x.permute(0, 3, 1, 2), weight[:, :, None, None]
        assert choose(conv_call(packed, square, POINT, 1), "auto") == engine


class Mixer(nn.Module):
    """A layer on channels-last patches and one on a row per image, which 2-D input stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y, self.head(rows)


@pytest.mark.parametrize("slow", [False, True])
def test_a_sparsified_linear_layer_gives_what_it_gave(slow, monkeypatch):
    monkeypatch.setattr(choice, "products_are_slow", lambda: slow)
    plain = Mixer()
    model = sparsify(copy.deepcopy(plain))
    assert type(model.body) is PatchLinear
    assert list(model.state_dict()) == list(plain.state_dict())
    grid = PatchGrid.random(2, (3, 3), keep=4)
    packed, rows = torch.randn(8, 20, 2, 2), torch.randn(2, 20)
    with bind(model, grid):
        y, head = model(packed, rows)
    torch.testing.assert_close(y, plain(packed, rows)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(head, plain.head(rows))
    assert torch.equal(model(packed, rows)[0], plain(packed, rows)[0]), "with no grid bound it is the parent's"


def test_a_layer_that_cannot_be_adopted_stays_as_it_is():
    model = Mixer()
    model.head.forward = lambda input: input[:, :3]
    sparsify(model)
    assert type(model.head) is nn.Linear
    assert type(model.body) is PatchLinear
