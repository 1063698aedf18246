"""What the public functions refuse: arguments at their extremes, each in one sentence, whatever was called before."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchsparse
from patchsparse import (
    PatchGrid,
    UnsupportedModuleError,
    image_conv2d,
    image_conv_transpose2d,
    image_engine,
    image_grid,
    pack,
    patch_avg_pool2d,
    patch_batch_norm_act,
    patch_batch_norm_unpack,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
    sparsify,
    unpack,
)

from .test_conv import ENGINES
from .test_maps import grid

X, WEIGHT, BIAS = torch.ones(5, 4, 2, 2), torch.ones(6, 4, 3, 3), torch.ones(6)
TURNED, IMAGE, VECTOR = torch.ones(4, 6, 2, 2), torch.ones(2, 4, 4, 4), torch.ones(4)
HUGE = 2**40


def conv(packed: Any = X, weight: Any = WEIGHT, bias: Any = BIAS, on: Any = None, **more: Any) -> Tensor:
    return patch_conv2d(packed, weight, bias, grid() if on is None else on, **{"padding": 1, **more})


def transposed(packed: Any = X, weight: Any = TURNED, bias: Any = BIAS, **more: Any) -> Tensor:
    return patch_conv_transpose2d(packed, weight, bias, grid(), **{"stride": 2, **more})


def maximum(packed: Any = X, kernel: Any = 3, **more: Any) -> Tensor:
    return patch_max_pool2d(packed, grid(), kernel, **{"stride": 1, "padding": 1, **more})


def average(packed: Any = X, kernel: Any = 3, **more: Any) -> Tensor:
    return patch_avg_pool2d(packed, grid(), kernel, **{"stride": 1, "padding": 1, **more})


def norm(packed: Any = X, weight: Any = VECTOR, bias: Any = VECTOR, mean: Any = VECTOR, var: Any = VECTOR, **more: Any):
    return patch_batch_norm_act(packed, weight, bias, mean, var, **more)


def norm_unpack(packed: Any = X, weight: Any = VECTOR, mean: Any = VECTOR, var: Any = VECTOR, **more: Any):
    return patch_batch_norm_unpack(packed, grid(), weight, VECTOR, mean, var, **more)


def image(x: Any = IMAGE, weight: Any = WEIGHT, bias: Any = BIAS, **more: Any) -> Tensor:
    return image_conv2d(x, weight, bias, **more)


# Every kind of wrong argument: what it is, what is called with it, and what the sentence names.
REFUSED: dict[str, list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]]] = {
    "a number beyond int32": [
        (conv, {"dilation": HUGE, "padding": HUGE}, ValueError, "dilation 1099511627776 is out of range"),
        (conv, {"dilation": (1, 2**30), "padding": (1, 2**30)}, ValueError, "out of range"),
        (conv, {"stride": HUGE}, ValueError, "stride 1099511627776"),
        (conv, {"padding": HUGE}, ValueError, "padding 1099511627776"),
        (conv, {"weight": torch.ones(6, 4, 1, 1), "padding": 0, "dilation": HUGE}, ValueError, "dilation"),
        (transposed, {"stride": HUGE, "output_padding": HUGE - 2}, ValueError, "stride 1099511627776"),
        (maximum, {"kernel": (HUGE, 1)}, ValueError, "kernel 1099511627776"),
        (average, {"divisor_override": HUGE}, ValueError, "divisor_override"),
        (PatchGrid.random, {"batch": HUGE, "shape": (3, 3), "keep": 1}, ValueError, "at most 2147483647 patches"),
    ],
    "a number below its range": [
        (conv, {"stride": 0}, ValueError, "stride 0"),
        (conv, {"padding": -1}, ValueError, "padding -1"),
        (conv, {"dilation": (1, 0)}, ValueError, "dilation 0"),
        (conv, {"groups": 0}, ValueError, "groups=0"),
        (conv, {"groups": -2}, ValueError, "groups=-2"),
        (transposed, {"stride": 0}, ValueError, "stride 0"),
        (transposed, {"padding": -1, "output_padding": -2}, ValueError, "padding -1"),
        (transposed, {"output_padding": -1, "stride": 1}, ValueError, "output_padding -1 must be 0 or more"),
        (transposed, {"output_padding": 3, "stride": 1, "padding": 2}, ValueError, "less than stride 1"),
        (transposed, {"groups": -2}, ValueError, "groups=-2"),
        (maximum, {"kernel": 0}, ValueError, "kernel 0"),
        (average, {"divisor_override": 0}, ValueError, "divisor_override must be None or a positive int32, got 0"),
        (average, {"divisor_override": -3}, ValueError, "divisor_override"),
        (norm, {"eps": -1.0}, ValueError, "eps"),
        (norm, {"eps": float("nan")}, ValueError, "eps"),
        (norm, {"activation": "leaky_relu", "slope": 1e300}, ValueError, "slope"),
        (PatchGrid.random, {"batch": -1, "shape": (3, 3), "keep": 1}, ValueError, "no negative batch, got -1"),
        (PatchGrid.random, {"batch": 1, "shape": (3, 0), "keep": 1}, ValueError, "positive shape"),
    ],
    "a number of another type": [
        (conv, {"stride": 1.0}, TypeError, "stride must be an int, got 1.0"),
        (conv, {"stride": True}, TypeError, "stride must be an int, got True"),
        (conv, {"padding": (1, 1.5)}, TypeError, "padding must be an int, got 1.5"),
        (conv, {"padding": (1, True)}, TypeError, "padding must be an int"),
        (conv, {"dilation": torch.tensor(1)}, TypeError, "dilation must be an int"),
        (conv, {"padding": "same"}, ValueError, "padding must be an int or a pair"),
        (conv, {"padding": (1, 1, 1)}, ValueError, "padding must be an int or a pair"),
        (conv, {"groups": True}, TypeError, "groups must be an int, got True"),
        (conv, {"groups": 1.0}, TypeError, "groups must be an int, got 1.0"),
        (transposed, {"output_padding": 0.0}, TypeError, "output_padding must be an int"),
        (maximum, {"kernel": 3.0}, TypeError, "kernel_size must be an int"),
        (average, {"divisor_override": 2.5}, TypeError, "divisor_override must be an int"),
        (norm, {"momentum": None, "training": True}, TypeError, "momentum must be a number"),
        (PatchGrid.random, {"batch": 1.5, "shape": (3, 3), "keep": 1}, TypeError, "batch must be an int"),
        (PatchGrid.random, {"batch": 1, "shape": (3, 3.0), "keep": 1}, TypeError, "shape must be an int"),
        (lambda size: grid().pixels(size), {"size": (4.0, 4)}, TypeError, "size must be an int"),
        (lambda size: grid().pixels(size), {"size": (0, 4)}, ValueError, "does not divide an image of 0x4"),
        (lambda size: grid().pixels(size), {"size": (4, 4, 4)}, ValueError, "size must be an int or a pair"),
    ],
    "channels or pixels that are not there": [
        (conv, {"weight": torch.ones(0, 4, 3, 3), "bias": None}, ValueError, r"weight \(0, 4, 3, 3\)"),
        (conv, {"packed": X[:, :0], "weight": WEIGHT[:, :0]}, ValueError, r"weight \(6, 0, 3, 3\)"),
        (conv, {"weight": WEIGHT[:, :, :0], "padding": 0}, ValueError, "one tap or more"),
        (conv, {"packed": X[:, :, :0]}, ValueError, "height of 0 pixels"),
        (conv, {"packed": X[:, :, 0]}, ValueError, r"packed must be \(N, C, ph, pw\)"),
        (conv, {"weight": WEIGHT[0]}, ValueError, r"weight \(4, 3, 3\)"),
        (transposed, {"weight": torch.ones(4, 0, 2, 2)}, ValueError, r"weight \(4, 0, 2, 2\)"),
        (transposed, {"packed": X[:, :, :, :0]}, ValueError, "cannot be enlarged"),
        (maximum, {"packed": X[:, :0]}, ValueError, "0 channels"),
        (average, {"packed": X[:, :0]}, ValueError, "0 channels"),
        (image, {"x": IMAGE[:, :, 0]}, ValueError, r"image must be \(B, C, H, W\)"),
        (image, {"weight": torch.ones(6, 4, 2, 2)}, ValueError, "an even kernel"),
        (lambda **a: pack(**a, grid=grid()), {"x": IMAGE[:, :, :0]}, ValueError, "image of 0x4 pixels"),
        (PatchGrid.from_active, {"active": torch.ones(2, 0, 3).bool()}, ValueError, "positive Gh and Gw"),
    ],
    "rows of another grid": [
        (conv, {"packed": X[:4]}, ValueError, "N=5 active patches"),
        (transposed, {"packed": X[:4]}, ValueError, "N=5 active patches"),
        (maximum, {"packed": torch.ones(6, 4, 2, 2)}, ValueError, "N=5 active patches"),
        (average, {"packed": X[:4]}, ValueError, "N=5 active patches"),
        (norm_unpack, {"packed": X[:4]}, ValueError, "N=5 active patches"),
        (lambda **a: unpack(**a, grid=grid()), {"packed": X[:4]}, ValueError, "N=5 active patches"),
        (lambda **a: pack(**a, grid=grid()), {"x": IMAGE[:1]}, ValueError, "B=2"),
        (conv, {"on": grid().slot}, TypeError, "a PatchGrid"),
        (lambda order: grid().permute(order), {"order": torch.arange(4)}, ValueError, r"order must be \(5,\)"),
        (lambda order: grid().permute(order), {"order": torch.tensor([0, 1, 2, 3, 3])}, ValueError, "once"),
        (lambda order: grid().permute(order), {"order": torch.tensor([0, 1, 2, 3, -1])}, ValueError, "once"),
        (lambda order: grid().permute(order), {"order": torch.ones(5).bool()}, TypeError, "row numbers"),
        (lambda order: grid().permute(order), {"order": torch.arange(5.0)}, TypeError, "row numbers"),
    ],
    "an operand on another device": [
        (conv, {"weight": WEIGHT.to("meta")}, ValueError, "weight on meta"),
        (conv, {"bias": BIAS.to("meta")}, ValueError, "bias on meta"),
        (conv, {"packed": X.to("meta")}, ValueError, "the tensor is on meta and the grid on cpu"),
        (transposed, {"weight": torch.ones(4, 6, 2, 2, device="meta")}, ValueError, "weight on meta"),
        (norm, {"weight": VECTOR.to("meta")}, ValueError, "meta"),
        (norm, {"mean": VECTOR.to("meta"), "training": True}, ValueError, "running_mean must be .* meta"),
        (norm, {"residual": X.to("meta")}, ValueError, "meta"),
        (norm_unpack, {"fill": VECTOR.to("meta")}, ValueError, "fill on meta"),
        (lambda **a: unpack(X, grid(), **a), {"fill": VECTOR.to("meta")}, ValueError, "fill on meta"),
        (image, {"weight": WEIGHT.to("meta")}, ValueError, "weight on meta"),
        (image, {"bias": BIAS.to("meta")}, ValueError, "bias on meta"),
        (image_conv_transpose2d, {"image": IMAGE, "weight": torch.ones(4, 6, 4, 4).to("meta")}, ValueError, "meta"),
    ],
    "an operand of another dtype, layout or shape": [
        (conv, {"weight": WEIGHT.double()}, TypeError, "weight torch.float64"),
        (conv, {"bias": BIAS.half()}, TypeError, "bias torch.float16"),
        (conv, {"packed": X.long(), "weight": WEIGHT.long(), "bias": None}, TypeError, "not torch.int64"),
        (conv, {"weight": WEIGHT.numpy()}, TypeError, "must be tensors, got ndarray"),
        (conv, {"weight": WEIGHT.to_sparse()}, ValueError, "strided"),
        (conv, {"packed": X.to_sparse()}, ValueError, "strided"),
        (maximum, {"packed": X.long()}, TypeError, "not torch.int64"),
        (average, {"packed": X.to(torch.complex64)}, TypeError, "not torch.complex64"),
        (norm, {"weight": VECTOR[:1]}, ValueError, r"weight must be \(4,\)"),
        (norm, {"var": VECTOR[:3], "training": True}, ValueError, r"running_var must be \(4,\)"),
        (norm, {"mean": None}, ValueError, "belong together"),
        (norm, {"bias": VECTOR.long()}, TypeError, "float dtype"),
        (norm, {"residual": X[:1]}, ValueError, "residual"),
        (norm_unpack, {"weight": torch.ones(1)}, ValueError, r"weight must be \(4,\)"),
        (norm_unpack, {"fill": torch.ones(3)}, ValueError, "one value per channel"),
        (lambda **a: unpack(X.long(), grid(), **a), {"fill": 0.5}, ValueError, "fill=0.5 is no torch.int64"),
        (lambda **a: unpack(X.byte(), grid(), **a), {"fill": -1}, ValueError, "fill=-1 is no torch.uint8"),
        (lambda **a: unpack(X.bool(), grid(), **a), {"fill": -2.0}, ValueError, "fill=-2.0 is no torch.bool"),
        (lambda **a: unpack(X.half(), grid(), **a), {"fill": 1e6}, ValueError, "fill=1000000.0 is no torch.float16"),
        (lambda **a: unpack(X.long(), grid(), **a), {"fill": VECTOR}, TypeError, "cast one"),
        (lambda **a: unpack(X, grid(), **a), {"fill": None}, TypeError, "fill must be a number"),
        (image, {"weight": WEIGHT.double()}, TypeError, "weight torch.float64"),
        (image, {"weight": torch.ones(6, 3, 3, 3)}, ValueError, "C_in must be 4"),
        (image, {"bias": torch.ones(5)}, ValueError, r"bias must be \(6,\)"),
        (image_conv_transpose2d, {"image": IMAGE, "weight": torch.ones(4, 6, 3, 3)}, ValueError, "4x4 kernel"),
        (image_engine, {"image": IMAGE, "out_channels": 2.0}, TypeError, "out_channels must be an int"),
        (image_grid, {"image": IMAGE[0]}, ValueError, r"image must be \(B, C, H, W\)"),
    ],
    "scores and shares without an order": [
        (PatchGrid.from_scores, {"scores": torch.tensor([[[0.9, np.nan]]]), "keep": 1}, ValueError, "holds NaN"),
        (PatchGrid.from_scores, {"scores": torch.ones(1, 2, 2).bool(), "keep": 1}, TypeError, "ordered"),
        (PatchGrid.from_scores, {"scores": [[[0.1]]], "keep": 1}, TypeError, "scores must be a tensor"),
        (PatchGrid.from_scores, {"scores": torch.ones(1, 2, 2), "keep": float("nan")}, ValueError, "keep=nan"),
        (PatchGrid.from_scores, {"scores": torch.ones(1, 2, 2), "keep": float("inf")}, ValueError, "keep=inf"),
        (PatchGrid.from_scores, {"scores": torch.ones(1, 2, 2), "keep": np.float32(1.5)}, ValueError, "keep=1.5"),
        (PatchGrid.from_active, {"active": [[[True]]]}, TypeError, "active must be a tensor"),
    ],
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("called_before", [False, True])
def test_what_is_refused_is_named(kind, called_before):
    if called_before:  # what is worked out once for a call must not answer for another that compares equal
        for function in (conv, transposed, maximum, average, norm, norm_unpack, image):
            function()
        conv(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    for function, arguments, error, message in REFUSED[kind]:
        try:
            found = function(**arguments)
        except Exception as raised:
            found = raised
        named = type(found) is error and re.search(message, str(found))
        assert named, f"{function.__name__}({', '.join(arguments)}) gives {found!r}, not {error.__name__}: {message}"


@pytest.mark.parametrize("backend", ENGINES)
def test_operators_refuse_what_an_engine_would_follow(backend):
    """Past the front door, too: shapes, dtypes, devices and stencils that lead out of a tensor."""
    ops, maps, same = torch.ops.patchsparse, (grid().slot, grid().coords), ([1, 1], [1, 1], [1, 1], 1, backend)
    pool, tap = ([3, 3], [1, 1], [1, 1], [1, 1], backend), torch.zeros(5, 4, 2, 2, dtype=torch.uint8)
    weight = torch.ones(4, 4, 3, 3)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (ops.conv2d, (X[:4], weight, None, *maps, *same)),
        (ops.conv2d, (X, weight[:, :3], None, *maps, *same)),
        (ops.conv2d, (X, weight.double(), None, *maps, *same)),
        (ops.conv2d, (X, weight.to("meta"), None, *maps, *same)),
        (ops.conv2d, (X, weight, torch.ones(3), *maps, *same)),
        (ops.conv2d, (X, weight, None, *maps, [1, 1], [1, 1], [HUGE, 1], 1, backend)),
        (ops.conv2d, (X, weight, None, *maps, [1, 1], [1, 1], [1, 1], -1, backend)),
        (ops.conv2d, (X, weight, None, *maps, [1, 1, 1], [1, 1], [1, 1], 1, backend)),
        (ops.conv2d, (X, weight, None, *maps, [3, 1], [1, 1], [1, 1], 1, backend)),
        (ops.conv2d, (X, weight, None, *maps, [1, 1], [0, 0], [1, 1], 1, backend)),
        (ops.conv2d, (X[:, :, :0], weight, None, *maps, *same)),
        (ops.conv2d_dgrad, (X[:, :3], weight, *maps, *same)),
        (ops.conv2d_dgrad, (X, weight, *maps, [0, 1], [1, 1], [1, 1], 1, backend)),
        (ops.conv2d_wgrad, (X, X[:, :, :1], *maps, [3, 3], *same)),
        (ops.conv2d_wgrad, (X, X[:4], *maps, [3, 3], *same)),
        (ops.conv2d_wgrad, (X, X.double(), *maps, [3, 3], *same)),
        (ops.max_pool2d, (X[:4], *maps, *pool)),
        (ops.max_pool2d_grad, (X, tap[:, :3], *maps, *pool)),
        (ops.max_pool2d_grad, (X, tap.long(), *maps, *pool)),
        (ops.unpack, (X, torch.ones(3), *maps)),
        (ops.pack, (IMAGE[:, :, :3], *maps)),
        (ops.batch_norm_act, (X, None, torch.ones(3), None, None, None, 1e-5, "relu", 0.0, backend)),
        (ops.batch_norm_act, (X, X[:1], None, None, None, None, 1e-5, "relu", 0.0, backend)),
        (ops.batch_norm_unpack, (X, torch.ones(3), None, None, None, None, *maps, 1e-5, backend)),
    ]
    for operator, arguments in calls:
        with pytest.raises((ValueError, TypeError)):
            operator(*arguments)


def test_numbers_of_numpy_count_as_numbers():
    expected = conv(stride=2, padding=1)
    assert torch.equal(conv(stride=np.int64(2), padding=(np.int32(1), np.int8(1)), groups=np.int64(1)), expected)
    assert torch.equal(maximum(kernel=np.int64(3)), maximum())
    assert torch.equal(average(divisor_override=np.int32(9)), average())
    scores = torch.rand(2, 3, 3)
    shares: list[Any] = [np.int64(4), np.float32(0.5), np.float64(0.5), np.uint8(2)]
    for keep, same in zip(shares, (4, 0.5, 0.5, 2), strict=True):
        assert torch.equal(PatchGrid.from_scores(scores, keep).slot, PatchGrid.from_scores(scores, same).slot)
    assert PatchGrid.random(np.int64(1), np.array([2, 3]), np.float32(1)).num_active == 6  # pyright: ignore
    fill: Any = np.float32(2)
    assert unpack(X, grid(), fill).max() == 2


@pytest.mark.parametrize("backend", ENGINES)
def test_grids_and_batches_of_nothing_are_no_extreme(backend):
    none = PatchGrid.from_active(torch.zeros(0, 2, 2, dtype=torch.bool))
    empty = pack(torch.ones(0, 4, 4, 4), none)
    assert patch_conv2d(empty, WEIGHT, BIAS, none, padding=1, backend=backend).shape == (0, 6, 2, 2)
    assert unpack(patch_max_pool2d(empty, none, 3, 1, 1, backend=backend), none).shape == (0, 4, 4, 4)
    assert none.complement().num_active == none.permute(torch.arange(0)).num_active == 0


@pytest.mark.parametrize("kind", ["LazyConv2d", "LazyConvTranspose2d", "LazyBatchNorm2d", "LazyLinear"])
def test_a_module_without_parameters_yet_is_refused_with_the_remedy(kind):
    layers = {"LazyConv2d": (4, 3, 1, 1), "LazyConvTranspose2d": (4, 2, 2), "LazyLinear": (4,)}.get(kind, ())
    model = nn.Sequential(nn.Identity(), getattr(nn, kind)(*layers))
    with pytest.raises(UnsupportedModuleError, match="run a batch through the model first"):
        sparsify(model)
    model(torch.ones(2, 4, 4, 4))
    sparsify(model)


def test_a_slope_keeps_its_digits_in_float64():
    x = -torch.rand(5, 4, 2, 2, dtype=torch.float64).requires_grad_()
    y = patch_batch_norm_act(x, None, None, torch.zeros(4), torch.ones(4), eps=0.0, activation="leaky_relu", slope=0.2)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 0.2))


@pytest.mark.parametrize("backend", ENGINES)
def test_max_pooling_pads_as_far_as_its_dilated_kernel(backend):
    """PyTorch's own padding ends at half a kernel; the image is extended instead."""
    x = torch.randn(5, 4, 4, 4, requires_grad=True)
    results = []
    for engine in (backend, "gather"):
        y = patch_max_pool2d(x, grid(), 3, 1, 3, 3, backend=engine)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_every_public_function_says_what_it_raises():
    silent = {"available_backends", "join_statistics", "PatchGrid", "UnsupportedModuleError"}
    for name in set(patchsparse.__all__) - silent:
        assert "Raises" in getattr(patchsparse, name).__doc__, name
