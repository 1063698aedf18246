"""Fused batch normalisation + activation: the PyTorch version, which is the specification, against PyTorch's parts."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from patchsparse import patch_batch_norm_act
from patchsparse.functional.norm import ACTIVATIONS
from patchsparse.ops import norm as ops

PARTS = {"identity": lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu}


def problem(rows: int = 6, channels: int = 5) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, channels, 2, 3), (rows, channels, 2, 3), (channels,), (channels,))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_batch_norm_then_residual_then_activation(activation, training):
    x, residual, weight, bias = problem()
    states = [(torch.full((5,), 0.3, dtype=torch.float64), torch.full((5,), 2.0, dtype=torch.float64)) for _ in "ab"]
    got = patch_batch_norm_act(x, weight, bias, *states[0], training, activation=activation, residual=residual)
    normalised = F.batch_norm(x, *states[1], weight, bias, training)
    expected = PARTS[activation](normalised + residual)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other)
    direction = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = (x, residual, weight, bias)
    grads = [torch.autograd.grad(y, inputs, direction) for y in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# opcheck itself reads .grad of the clones that it makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("with_optional", [True, False])
def test_registered_operators_pass_opcheck(with_optional):
    x, residual, weight, bias = (t.float().detach().requires_grad_() for t in problem())
    optional = (residual, weight, bias) if with_optional else (None, None, None)
    opcheck(ops.batch_norm_act.registered, (x, *optional, None, None, 1e-5, "relu", 0.01, "auto"))
    mean, var = torch.zeros(5), torch.ones(5)
    arguments = (x.detach(), x.detach(), *optional, mean, var, 1e-5, "silu", 0.01, True, "auto")
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    opcheck(ops.batch_norm_act_grad.registered, detached)


def test_no_rows_leave_the_running_statistics():
    mean, var = torch.zeros(5), torch.ones(5)
    y = patch_batch_norm_act(torch.zeros(0, 5, 2, 2), None, None, mean, var, True)
    assert y.shape == (0, 5, 2, 2)
    assert torch.equal(mean, torch.zeros(5))
    assert torch.equal(var, torch.ones(5))


def test_bad_arguments_are_named():
    x = torch.zeros(4, 5, 2, 2)
    with pytest.raises(ValueError, match="activation 'tanh' is unknown"):
        patch_batch_norm_act(x, None, None, None, None, activation="tanh")
    with pytest.raises(ValueError, match="residual \\(4, 5, 1, 1\\) must have the shape"):
        patch_batch_norm_act(x, None, None, None, None, residual=torch.zeros(4, 5, 1, 1))
    with pytest.raises(ValueError, match="more than one value per channel"):
        patch_batch_norm_act(torch.zeros(1, 5, 1, 1), None, None, None, None)
