"""Eager calls go past the registered operators: the same results, and whoever traces still meets the operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from patchsparse import PatchGrid, patch_batch_norm_act, patch_conv2d, patch_max_pool2d, unpack
from patchsparse.eager import forget, once
from patchsparse.ops import norm, norm_unpack
from patchsparse.ops.operator import Operator

from .test_ops import operator_calls

GRID = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))


def calls() -> list[tuple[Operator, tuple[Any, ...]]]:
    """Return every operator with arguments that require gradients."""
    x, vector = torch.randn(8, 4, 2, 2).requires_grad_(), torch.randn(4).requires_grad_()
    mean, var = torch.zeros(4), torch.ones(4)
    maps = (GRID.slot, GRID.coords)
    return [
        *operator_calls(GRID, 4),
        (norm.batch_norm_act, (x, x, vector, vector, None, None, 1e-5, "relu", 0.01, "auto")),
        (norm.batch_norm_act, (x, None, None, None, mean, var, 1e-5, "silu", 0.01, "auto")),
        (
            norm.batch_norm_act_grad,
            (x.detach(), x.detach(), None, None, None, mean, var, 1e-5, "relu", 0.0, True, "auto"),
        ),
        (norm_unpack.batch_norm_unpack, (x, vector, vector, vector, None, None, *maps, 1e-5, "auto")),
        (norm_unpack.batch_norm_unpack, (x, None, None, None, mean, var, *maps, 1e-5, "auto")),
    ]


def results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor | None]:
    """Return the outputs and the gradients at all arguments that require one."""
    outputs = function(*arguments)
    outputs: list[Tensor | None] = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = list({id(a): a for a in arguments if isinstance(a, Tensor) and a.requires_grad}.values())
    differentiable = [o for o in outputs if o is not None and o.requires_grad]
    if not differentiable:
        return outputs
    directions = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in differentiable]
    return [*outputs, *torch.autograd.grad(differentiable, leaves, directions)]


@pytest.mark.parametrize("index", range(len(calls())))
def test_both_ways_give_the_same_bits(index):
    operator, arguments = calls()[index]
    eager, registered = results(operator, arguments), results(operator.registered, arguments)
    assert len(eager) == len(registered)
    for one, other in zip(eager, registered, strict=True):
        if one is None:  # a schema has no None among results
            assert other is not None
            assert other.numel() == 0
        else:
            assert torch.equal(one, other)  # pyright: ignore[reportArgumentType]


class Names(TorchDispatchMode):
    """Keep the names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def conv(x: Tensor, weight: Tensor) -> Tensor:
    return patch_conv2d(x, weight, None, GRID, padding=1, backend="gather")


def leaves() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4, 2, 2, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)


def test_an_eager_call_does_not_meet_the_registered_operator():
    inputs = leaves()
    with torch.profiler.profile(acc_events=True) as seen:
        conv(*inputs).sum().backward()
    assert not [event.key for event in seen.key_averages() if event.key.startswith("patchsparse::")]


def test_a_dispatch_mode_sees_the_operators_of_both_passes():
    with Names() as seen:
        conv(*leaves()).sum().backward()
    ours = [name for name in seen.names if name.startswith("patchsparse::")]
    assert ours == ["patchsparse::conv2d", "patchsparse::conv2d_dgrad", "patchsparse::conv2d_wgrad"]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator(mode):
    def on_maps(x, weight, slot, coords):
        return patch_conv2d(x, weight, None, PatchGrid(slot >= 0, coords, slot), padding=1, backend="gather")

    inputs = [*(t.detach() for t in leaves()), GRID.slot, GRID.coords]
    graph = make_fx(on_maps, tracing_mode=mode)(*inputs)
    assert torch.ops.patchsparse.conv2d.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(*inputs), on_maps(*inputs))


def test_function_transforms_differentiate():
    x, weight = leaves()
    expected = torch.autograd.grad(conv(x, weight).square().sum(), weight)[0]
    found = torch.func.grad(lambda w: conv(x.detach(), w).square().sum())(weight.detach())
    assert torch.equal(found, expected)
    jacobian = torch.func.jacrev(lambda w: conv(x.detach(), w).square().sum((1, 2, 3))[:1], chunk_size=1)
    assert torch.func.grad(lambda w: jacobian(w).sum())(weight.detach()).isfinite().all()


def test_a_tensor_that_a_transform_left_behind():
    x, weight = leaves()
    left = []

    def leave(y):
        left.append(y)
        return y.sum()

    torch.func.grad(leave)(x.detach())
    found = torch.autograd.grad(conv(left[0], weight).square().sum(), weight)
    assert torch.equal(found[0], torch.autograd.grad(conv(x.detach(), weight).square().sum(), weight)[0])


class Wrapped(Tensor):
    """A subclass, which follows its tensors through registered operators."""


@pytest.mark.parametrize("subclass", [True, False])
def test_a_subclass_takes_the_operator(subclass):
    x, weight = leaves()
    with torch.profiler.profile(acc_events=True) as seen:
        conv(x.as_subclass(Wrapped) if subclass else x, torch.nn.Parameter(weight.detach()))
    assert subclass is ("patchsparse::conv2d" in {event.key for event in seen.key_averages()})


def test_hooks_of_saved_tensors_are_called():
    kept: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    x, weight = leaves()
    expected = torch.autograd.grad(conv(x, weight).sum(), (x, weight))
    with saved_tensors_hooks(keep, lambda t: t.clone()):
        y = conv(x, weight)
    found = torch.autograd.grad(y.sum(), (x, weight))
    assert (8, 4, 2, 2) in kept
    assert (4, 4, 3, 3) in kept
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


class Stop(torch.autograd.Function):
    """The identity, whose backward pass has nothing to say."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return None


@pytest.mark.parametrize(
    "run",
    [
        lambda x: patch_max_pool2d(x, GRID, 3, 1, 1),
        lambda x: patch_batch_norm_act(x, None, None, None, None),
        lambda x: conv(x, torch.ones(4, 4, 3, 3)),
        lambda x: unpack(x, GRID),
    ],
)
def test_no_gradient_from_above_is_none_or_zero_below(run):
    x = leaves()[0]
    Stop.apply(run(x)).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize(
    "run", [lambda x: patch_batch_norm_act(x, None, None, None, None), lambda x: patch_max_pool2d(x, GRID, 3, 1, 1)]
)
def test_a_second_derivative_that_is_not_there_is_refused(run):
    x = leaves()[0]
    (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"patchsparse::\w+_grad has no derivative"):
        torch.autograd.grad(grad.sum(), x)


def test_given_statistics_are_not_copied_but_by_the_registered_operator():
    x, mean, var = torch.randn(8, 4, 2, 2), torch.zeros(4), torch.ones(4)
    arguments = (x, None, None, None, mean, var, 1e-5, "relu", 0.01, "auto")
    assert norm.batch_norm_act(*arguments)[1].data_ptr() == mean.data_ptr()
    copied = norm.batch_norm_act.registered(*arguments)[1]
    assert torch.equal(copied, mean)
    assert copied.data_ptr() != mean.data_ptr()


def test_what_is_worked_out_once():
    asked = []

    @once
    def twice(value):
        asked.append(value)
        if value is None:
            raise TypeError("no number")
        return 2 * value

    assert [twice(1), twice(1), twice(2)] == [2, 2, 4]
    assert asked == [1, 2]
    assert twice([1]) == [1, 1]  # without a hash
    with pytest.raises(TypeError, match="no number"):
        twice(None)
    forget()
    assert twice(1) == 2
    assert asked.count(1) == 2
