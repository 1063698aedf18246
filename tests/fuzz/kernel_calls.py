"""Random right calls of the kernels' public functions and operators, each with the reference of whole images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import patchsparse
from patchsparse import PatchGrid

__all__ = ["TOLERANCES", "Call", "drawn", "laid_out"]

# Share of the largest value by which a result may be off; a wrong one is off by more than all of these.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 2e-2}
ENGINES = ("auto", "auto", "gather", "cpp", "dense")
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, slope: F.silu(x),
}


@dataclass
class Call:
    """Hold a function, its arguments by name, and what must come out of the right ones.

    ``reference`` takes the arguments, tensors of numbers as float64, and the true ``active`` map.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    reference: Callable[[dict[str, Any], Tensor], Tensor]
    active: Tensor
    differentiable: tuple[str, ...] = ()


def laid_out(packed: Tensor, active: Tensor, fill: Any = 0.0) -> Tensor:
    """Return whole images of packed patches, rows in the order of the map."""
    batch, rows, columns = active.shape
    _, channels, height, width = packed.shape
    tiles = torch.zeros(batch, rows, columns, height, width, channels, dtype=packed.dtype)
    tiles = tiles + (fill if isinstance(fill, Tensor) else float(fill))
    tiles = tiles.masked_scatter(active[..., None, None, None].expand_as(tiles), packed.permute(0, 2, 3, 1))
    # Contiguous: of an image alone with odd strides PyTorch gets the weight gradient of grouped convolutions wrong.
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * height, columns * width).contiguous()


def cut_out(image: Tensor, active: Tensor) -> Tensor:
    """Return the active patches of whole images, rows in the order of the map."""
    batch, channels, height, width = image.shape
    rows, columns = active.shape[1:]
    patches = image.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return patches.permute(0, 2, 4, 1, 3, 5)[active]


class _Draw:
    """Draw what calls are made of."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.generator = torch.Generator().manual_seed(random.getrandbits(32))
        self.dtype = random.choice((*TOLERANCES, torch.float32, torch.float64))
        self.height, self.width = random.choice((1, 2, 3, 4, 8)), random.choice((1, 2, 4, 6, 8))
        shape = random.randrange(4), random.randrange(1, 5), random.randrange(1, 5)
        self.active = torch.rand(shape, generator=self.generator) < random.choice((0.0, 0.3, 0.6, 1.0))
        self.grid = PatchGrid.from_active(self.active.clone())
        self.rows = int(self.active.sum())
        self.channels = random.choice((1, 2, 3, 4, 8, 17, 32))

    def normal(self, *shape: int) -> Tensor:
        """Return random numbers, at times not contiguous or in another memory layout."""
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        match self.random.randrange(6):
            case 0 if len(shape) == 4:
                return value.contiguous(memory_format=torch.channels_last)
            case 1:
                return torch.stack((value, value), -1)[..., 0]
            case 2 if len(shape) == 4:
                return value.transpose(2, 3).contiguous().transpose(2, 3)
        return value

    def packed(self) -> Tensor:
        return self.normal(self.rows, self.channels, self.height, self.width)

    def axis(self, patch: int) -> tuple[int, int, int, int]:
        """Return kernel, stride, padding and dilation that map patches to patches."""
        kernel, dilation = self.random.choice((1, 2, 3, 3, 5, 7)), self.random.choice((1, 1, 2, 3))
        stride = self.random.choice([stride for stride in (1, 2, 4) if patch % stride == 0])
        reach = dilation * (kernel - 1)
        paddings = [p for p in range(reach // 2 + 1) if reach + 1 - stride <= 2 * p]
        return (kernel, stride, self.random.choice(paddings), dilation) if paddings else (1, stride, 0, 1)

    def stencil(self) -> tuple[tuple[int, int], dict[str, Any]]:
        ways = zip(self.axis(self.height), self.axis(self.width), strict=True)
        kernel, stride, padding, dilation = (tuple(way) for way in ways)
        return kernel, {"stride": stride, "padding": padding, "dilation": dilation}  # pyright: ignore

    def groups(self) -> int:
        return self.random.choice([g for g in (1, 1, 2, self.channels) if self.channels % g == 0])

    def backend(self) -> str:
        return self.random.choice(ENGINES)


def drawn(random: Random) -> Call:
    """Draw a right call."""
    return random.choice(KINDS)(_Draw(random))


def _conv2d(draw: _Draw) -> Call:
    kernel, stencil = draw.stencil()
    groups = draw.groups()
    out = groups * draw.random.choice((1, 2, 5, 16))
    arguments = {
        "packed": draw.packed(),
        "weight": draw.normal(out, draw.channels // groups, *kernel),
        "bias": draw.random.choice((None, draw.normal(out))),
        "grid": draw.grid,
        **stencil,
        **{"groups": groups, "backend": draw.backend()},
    }
    return Call(patchsparse.patch_conv2d, arguments, _conv2d_reference, draw.active, ("packed", "weight"))


def _conv2d_reference(a: dict[str, Any], active: Tensor) -> Tensor:
    image, options = laid_out(a["packed"], active), (a["stride"], a["padding"], a["dilation"], a["groups"])
    return cut_out(F.conv2d(image, a["weight"], a["bias"], *options), active)


def _transposed(draw: _Draw) -> Call:
    side = draw.random.choice(((4, 2, 1, 0), (2, 2, 0, 0), (3, 2, 1, 1), (1, 1, 0, 0), (3, 1, 1, 0), (5, 1, 2, 0)))
    kernel, stride, padding, extra = side
    groups = draw.groups()
    width = draw.random.choice((1, 3, 8))
    arguments = {
        "packed": draw.packed(),
        "weight": draw.normal(draw.channels, width, kernel, kernel),
        "bias": draw.random.choice((None, draw.normal(width * groups))),
        **{"grid": draw.grid, "stride": stride, "padding": padding, "output_padding": extra, "groups": groups},
        **{"dilation": 1, "backend": draw.backend()},
    }
    return Call(patchsparse.patch_conv_transpose2d, arguments, _transposed_reference, draw.active, ("packed", "weight"))


def _transposed_reference(a: dict[str, Any], active: Tensor) -> Tensor:
    options = (a["stride"], a["padding"], a["output_padding"], a["groups"], a["dilation"])
    return cut_out(F.conv_transpose2d(laid_out(a["packed"], active), a["weight"], a["bias"], *options), active)


def _max_pool(draw: _Draw) -> Call:
    kernel, stencil = draw.stencil()
    arguments = {"packed": draw.packed(), "grid": draw.grid, "kernel_size": kernel, **stencil}
    if draw.random.random() < 0.1 and draw.rows:
        arguments["packed"][0, 0] = float("nan")
    arguments |= {"ceil_mode": False, "backend": draw.backend()}
    return Call(patchsparse.patch_max_pool2d, arguments, _max_pool_reference, draw.active)


def _max_pool_reference(a: dict[str, Any], active: Tensor) -> Tensor:
    # F.max_pool2d has a limit on its padding, which ours has not.
    (down, right), image = _both(a["padding"]), laid_out(a["packed"], active)
    image = F.pad(image, (right, right, down, down), value=-float("inf"))
    return cut_out(F.max_pool2d(image, a["kernel_size"], a["stride"], 0, a["dilation"], bool(a["ceil_mode"])), active)


def _both(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _avg_pool(draw: _Draw) -> Call:
    kernel, stencil = draw.stencil()
    if stencil.pop("dilation") != (1, 1):
        kernel, stencil = (3, 3), {"stride": 1, "padding": 1}
    arguments = {"packed": draw.packed(), "grid": draw.grid, "kernel_size": kernel, **stencil, "ceil_mode": False}
    arguments["count_include_pad"] = draw.random.random() < 0.5
    arguments |= {"divisor_override": draw.random.choice((None, None, 1, 7)), "backend": draw.backend()}
    return Call(patchsparse.patch_avg_pool2d, arguments, _avg_pool_reference, draw.active, ("packed",))


def _avg_pool_reference(a: dict[str, Any], active: Tensor) -> Tensor:
    options = (a["kernel_size"], a["stride"], a["padding"], bool(a["ceil_mode"]), bool(a["count_include_pad"]))
    return cut_out(F.avg_pool2d(laid_out(a["packed"], active), *options, a["divisor_override"]), active)


def _norm_arguments(draw: _Draw) -> dict[str, Any]:
    channels, affine = draw.channels, draw.random.random() < 0.7
    statistics = draw.random.random() < 0.8
    wide = torch.float64 if draw.dtype == torch.float64 else torch.float32
    return {
        "weight": draw.normal(channels) if affine else None,
        "bias": draw.normal(channels) if affine else None,
        "running_mean": draw.normal(channels).to(wide) if statistics else None,
        "running_var": draw.normal(channels).to(wide).abs() + 0.5 if statistics else None,
        "training": draw.random.random() < 0.5,
        "momentum": 0.1,
        "eps": draw.random.choice((1e-5, 1e-3, 0.1)),
    }


def _norm(draw: _Draw) -> Call:
    packed = draw.packed()
    arguments = {"packed": packed, **_norm_arguments(draw), "activation": draw.random.choice(list(ACTIVATIONS))}
    residual = draw.normal(*packed.shape) if draw.random.random() < 0.4 else None
    arguments |= {"slope": 0.2, "residual": residual, "backend": draw.backend()}
    return Call(patchsparse.patch_batch_norm_act, arguments, _norm_reference, draw.active, ("packed",))


def _norm_reference(a: dict[str, Any], active: Tensor) -> Tensor:
    y = _normalised(a)
    return ACTIVATIONS[a["activation"]](y if a["residual"] is None else y + a["residual"], a["slope"])


def _normalised(a: dict[str, Any]) -> Tensor:
    """Normalise by the formula: what `F.batch_norm` does, that moves the running statistics too."""
    own = a["training"] or a["running_mean"] is None or a["running_var"] is None
    packed: Tensor = a["packed"]
    mean = packed.mean((0, 2, 3)) if own else a["running_mean"]
    var = packed.var((0, 2, 3), unbiased=False) if own else a["running_var"]
    assert mean is not None
    assert var is not None
    y = (packed - mean[:, None, None]) / (var[:, None, None] + a["eps"]) ** 0.5
    y = y if a["weight"] is None else y * a["weight"][:, None, None]
    return y if a["bias"] is None else y + a["bias"][:, None, None]


def _norm_unpack(draw: _Draw) -> Call:
    fill = draw.random.choice((0.0, 1.5, draw.normal(draw.channels)))
    arguments = {"packed": draw.packed(), "grid": draw.grid, **_norm_arguments(draw), "fill": fill}
    arguments["backend"] = draw.backend()

    def reference(a: dict[str, Any], active: Tensor) -> Tensor:
        return laid_out(_normalised(a), active, a["fill"])

    return Call(patchsparse.patch_batch_norm_unpack, arguments, reference, draw.active, ("packed",))


def _pack(draw: _Draw) -> Call:
    batch, rows, columns = draw.active.shape
    image = draw.normal(batch, draw.channels, rows * draw.height, columns * draw.width)
    arguments = {"x": image, "grid": draw.grid}
    return Call(patchsparse.pack, arguments, lambda a, active: cut_out(a["x"], active), draw.active, ("x",))


def _unpack(draw: _Draw) -> Call:
    fill = draw.random.choice((0.0, -2.0, draw.normal(draw.channels)))
    arguments = {"packed": draw.packed(), "grid": draw.grid, "fill": fill}

    def reference(a: dict[str, Any], active: Tensor) -> Tensor:
        return laid_out(a["packed"], active, a["fill"])

    return Call(patchsparse.unpack, arguments, reference, draw.active, ("packed",))


def _image_conv2d(draw: _Draw) -> Call:
    kernel, size = draw.random.choice((1, 3)), (2 * draw.height, 2 * draw.width)
    channels = draw.random.choice((3, 32))
    arguments = {
        "image": draw.normal(draw.active.shape[0] + 1, channels, *size),
        "weight": draw.normal(32, channels, kernel, kernel),
        "bias": draw.random.choice((None, draw.normal(32))),
        "backend": draw.random.choice(("auto", "cpp", "gather")),
    }

    def reference(a: dict[str, Any], active: Tensor) -> Tensor:
        return F.conv2d(a["image"], a["weight"], a["bias"], padding=a["weight"].shape[2] // 2)

    return Call(patchsparse.image_conv2d, arguments, reference, draw.active, ("image", "weight"))


def _image_transposed(draw: _Draw) -> Call:
    arguments = {
        "image": draw.normal(draw.active.shape[0] + 1, draw.channels, draw.height, draw.width),
        "weight": draw.normal(draw.channels, 8, 4, 4),
        "bias": draw.random.choice((None, draw.normal(8))),
        "backend": draw.random.choice(("auto", "cpp", "gather")),
    }

    def reference(a: dict[str, Any], active: Tensor) -> Tensor:
        return F.conv_transpose2d(a["image"], a["weight"], a["bias"], 2, padding=1)

    return Call(patchsparse.image_conv_transpose2d, arguments, reference, draw.active, ("image", "weight"))


def _operator(draw: _Draw) -> Call:
    """Draw a call that goes round the front door, to a registered operator with the maps as they are."""
    call = draw.random.choice((_conv2d, _max_pool, _pack, _unpack))(draw)
    given = call.arguments
    maps = {"slot": draw.grid.slot, "coords": draw.grid.coords}
    ops: Any = torch.ops.patchsparse
    if call.function is patchsparse.patch_conv2d:
        names = ("stride", "padding", "dilation", "groups", "backend")
        call.arguments = {n: given[n] for n in ("packed", "weight", "bias")} | maps | {n: given[n] for n in names}
        call.function = lambda packed, **rest: ops.conv2d(packed, **rest)
    elif call.function is patchsparse.patch_max_pool2d:
        names = {"kernel": given["kernel_size"], **{n: given[n] for n in ("stride", "padding", "dilation", "backend")}}
        call.arguments = {"packed": given["packed"], **maps, **names}
        call.function = lambda packed, **rest: ops.max_pool2d(packed, **rest)[0]
        call.reference = lambda a, active: _max_pool_reference(
            a | {"kernel_size": a["kernel"], "ceil_mode": False}, active
        )
    elif call.function is patchsparse.pack:
        call.arguments = {"x": given["x"], **maps}
        call.function = ops.pack
    else:
        given["fill"] = given["fill"] if isinstance(given["fill"], Tensor) else None
        call.arguments = {"packed": given["packed"], "fill": given["fill"], **maps}
        call.function = lambda packed, fill, slot, coords: ops.unpack(packed, fill, slot, coords)
        call.reference = lambda a, active: laid_out(a["packed"], active, 0.0 if a["fill"] is None else a["fill"])
    return call


KINDS: list[Callable[[_Draw], Call]] = [
    *(_conv2d, _conv2d, _conv2d, _transposed, _max_pool, _avg_pool, _norm, _norm_unpack, _pack, _unpack),
    *(_image_conv2d, _image_transposed, _operator, _operator),
]
