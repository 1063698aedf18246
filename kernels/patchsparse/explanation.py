"""Which engines are here, and which one a call takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import pointwise, whole_images
from .backends import ENGINES, OVERRIDE, choose, engine, leaves, order, requested, why_not
from .functional import norm, pool
from .functional.conv import (
    autocast,
    conv2d_stencil,
    patch_conv2d,
    patch_conv_transpose2d,
    transposed_stencil,
)
from .geometry import POINT, Call, Pair, Stencil
from .grid import PatchGrid
from .ops.calls import call_on, conv_call, norm_call, pool_call
from .packing import check_packed, fill_values

__all__ = ["OPERATORS", "available_backends", "explain", "why_unavailable"]


def available_backends() -> tuple[str, ...]:
    """Return the names of the engines that can run here: a 3x3 float32 convolution on the CPU or the GPU, if any."""
    return tuple(name for name in ENGINES if why_unavailable(name) is None)


def why_unavailable(backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why an engine cannot run a 3x3 convolution on the CPU, nor on the GPU if there is one; None if it can.

    Raises:
        ValueError: for an unknown name.
    """
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    stencil = Stencil((3, 3), padding=(1, 1))
    reasons = [why_not(backend, Call("conv2d", device, dtype, 1, (8, 8), 64, 64, stencil)) for device in devices]
    return None if None in reasons else reasons[0]


def explain(operator: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> str:
    """Return which engine a call of an operator would take, by which method, and why not the others.

    No operator runs.

    Args:
        operator: a function of this package that takes ``backend``, such as `patch_conv2d`, or its name.
        *args: the arguments that it would be called with.
        **kwargs: the same by name, ``backend`` among them.

    Returns:
        one line on the call, one for each engine, and the order in which ``"auto"`` tries them.

    Raises:
        ValueError: if there is no such operator; and what the call itself raises for its arguments.
        TypeError: if the arguments do not fit the operator.
        RuntimeError: if a named backend cannot run the call, with its reason.

    Example::

        print(explain(patch_conv2d, packed, weight, None, grid, padding=1))
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in OPERATORS:
        raise ValueError(f"{name} is not an operator that an engine computes; choose one of {', '.join(OPERATORS)}")
    function, describe = OPERATORS[name]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return "\n".join(_lines(describe(**bound.arguments), bound.arguments["backend"]))


class Asked(NamedTuple):
    """What a call of a public operator asks of the engines.

    Attributes:
        x: the tensor that it works on.
        call: its forward pass.
        gradients: the operations of its backward pass, for which an engine is chosen anew.
        grid: its grid, if it has one.
        note: a sentence on the way it goes.
    """

    x: Tensor
    call: Call
    gradients: tuple[str, ...] = ()
    grid: PatchGrid | None = None
    note: str = ""


def _lines(asked: Asked, backend: str) -> Iterator[str]:
    call, stencil, grid = asked.call, asked.call.stencil, asked.grid
    taken = choose(call, backend)
    what = call.operation
    if stencil != POINT:
        what += f" {stencil.kernel[0]}x{stencil.kernel[1]} stride {stencil.stride}"
    active = "" if grid is None else f", {grid.num_active} of {grid.active.numel()} patches active"
    yield f"{what} on {tuple(asked.x.shape)} {call.dtype} {call.device}{active}"
    if asked.note:
        yield f"  {asked.note}"
    for name in ENGINES:
        yield f"  {name}: {_fate(name, taken, call, requested(backend))}"
    for operation in asked.gradients:
        yield f"  {operation}, in the backward pass: {choose(call._replace(operation=operation), backend)}"
    yield f"  order for auto: {', '.join(order(call))}; {OVERRIDE} overrides"


def _fate(name: str, taken: str, call: Call, asked: str) -> str:
    """Return what becomes of a call at one engine."""
    if name == taken:
        return f"taken, {engine(name).how(call)}"
    reason = why_not(name, call)
    if reason is not None:
        return f"cannot run, {reason}"
    left = leaves(name, call)
    if left is not None:
        return f"{left}: gather, the readable definition, serves"
    return "can run; slower here by measurement" if asked == "auto" else "can run; not asked for"


NEVER_LEAVES = "the stencil never leaves its patch: no neighbour is read"


def _conv2d(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: PatchGrid,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    **_: Any,
) -> Asked:
    packed, weight, bias = autocast(packed, weight, bias)
    stencil = conv2d_stencil(packed, weight, bias, grid, stride, padding, dilation, groups)
    if stencil.local:
        return Asked(packed, pointwise.conv_call(packed, weight, stencil, groups), (), grid, NEVER_LEAVES)
    return Asked(packed, conv_call("conv2d", packed, weight, stencil, groups), ("conv2d_dgrad", "conv2d_wgrad"), grid)


def _conv_transpose2d(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: PatchGrid,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
    **_: Any,
) -> Asked:
    packed, weight, bias = autocast(packed, weight, bias)
    stencil = transposed_stencil(packed, weight, bias, grid, stride, padding, output_padding, groups, dilation)
    size = (packed.shape[2] * stencil.stride[0], packed.shape[3] * stencil.stride[1])
    call = call_on("conv2d_dgrad", packed, size, (weight.shape[1] * groups, weight.shape[0]), stencil, groups)
    return Asked(
        packed, call, ("conv2d", "conv2d_wgrad"), grid, "a transposed convolution is the input gradient of another"
    )


def _max_pool2d(
    packed: Tensor,
    grid: PatchGrid,
    kernel_size: Pair,
    stride: Pair | None,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    **_: Any,
) -> Asked:
    stencil = pool.max_pool2d_stencil(packed, grid, kernel_size, stride, padding, dilation, ceil_mode)
    return _pooling("max_pool2d", packed, grid, stencil)


def _avg_pool2d(
    packed: Tensor, grid: PatchGrid, kernel_size: Pair, stride: Pair | None, padding: Pair, ceil_mode: bool, **_: Any
) -> Asked:
    stencil = pool.avg_pool2d_stencil(packed, grid, kernel_size, stride, padding, ceil_mode)
    return _pooling("avg_pool2d", packed, grid, stencil)


def _pooling(operation: str, packed: Tensor, grid: PatchGrid, stencil: Stencil) -> Asked:
    if stencil.local:
        return Asked(packed, pointwise.local_pool_call(f"local_{operation}", packed, stencil), (), grid, NEVER_LEAVES)
    return Asked(packed, pool_call(operation, packed, packed.shape[2:], stencil), (f"{operation}_grad",), grid)


def _batch_norm_act(
    packed: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    activation: str,
    slope: float,
    residual: Tensor | None,
    **_: Any,
) -> Asked:
    norm.check_norm_act(packed, activation, slope, residual)
    norm.given_statistics(packed, running_mean, running_var, training)
    return Asked(packed, norm_call("batch_norm_act", packed, packed.shape[0]), ("batch_norm_act_grad",))


def _batch_norm_unpack(
    packed: Tensor,
    grid: PatchGrid,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fill: float | Tensor,
    training: bool,
    **_: Any,
) -> Asked:
    check_packed(packed, grid)
    norm.given_statistics(packed, running_mean, running_var, training)
    fill_values(fill, packed)
    return Asked(packed, norm_call("batch_norm_unpack", packed, grid.slot.numel()), ("batch_norm_unpack_grad",), grid)


def _local_conv2d(x: Tensor, weight: Tensor, stencil: Stencil, groups: int, **_: Any) -> Asked:
    return Asked(x, pointwise.conv_call(x, weight, stencil, groups), note=NEVER_LEAVES)


def _local_linear(x: Tensor, weight: Tensor, **_: Any) -> Asked:
    return Asked(x, pointwise.linear_call(x, weight), note=NEVER_LEAVES)


def _image_conv2d(image: Tensor, weight: Tensor, backend: str, **_: Any) -> Asked:
    if weight.shape[2:] == (1, 1) and choose(whole_images.grid_call(image), backend) == "cpp":
        call = pointwise.conv_call(image, weight, POINT, 1)
        return Asked(image, call, note="each image is a single patch, and the convolution never leaves a pixel")
    return Asked(image, whole_images.conv2d_call(image, weight.shape[0], weight.shape[2:]))


def _image_conv_transpose2d(image: Tensor, weight: Tensor, **_: Any) -> Asked:
    return Asked(image, whole_images.conv_transpose2d_call(image, weight))


def _image_engine(image: Tensor, out_channels: int, **_: Any) -> Asked:
    return Asked(image, whole_images.conv2d_call(image, out_channels, whole_images.THREE.kernel))


def _image_grid(image: Tensor, **_: Any) -> Asked:
    return Asked(image, whole_images.grid_call(image))


# Every operator: the function, and what a call of it asks of the engines.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Asked]]] = {
    function.__name__: (function, describe)
    for function, describe in (
        (patch_conv2d, _conv2d),
        (patch_conv_transpose2d, _conv_transpose2d),
        (pool.patch_max_pool2d, _max_pool2d),
        (pool.patch_avg_pool2d, _avg_pool2d),
        (norm.patch_batch_norm_act, _batch_norm_act),
        (norm.patch_batch_norm_unpack, _batch_norm_unpack),
        (pointwise.local_conv2d, _local_conv2d),
        (pointwise.local_linear, _local_linear),
        (whole_images.image_conv2d, _image_conv2d),
        (whole_images.image_conv_transpose2d, _image_conv_transpose2d),
        (whole_images.image_engine, _image_engine),
        (whole_images.image_grid, _image_grid),
    )
}
