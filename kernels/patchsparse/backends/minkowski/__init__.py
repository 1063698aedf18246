"""The ``minkowski`` engine: MinkowskiEngine 0.5.4 behind the meaning of this package, when it is asked for by name.

MinkowskiEngine (Choy et al., CVPR 2019) finds neighbours with a hash table of coordinates and multiplies the pairs of
each kernel tap. Here it is given the pixels of the active patches, and the pixels of the same patches as outputs, so
that an output is active if and only if its patch is. Coordinates and kernel maps are made once per mask, and all layers
of a stage share them, forward and backward. It is the reference to compare with; the other engines are faster.

It has no pooling of its own: MinkowskiEngine's leaves inactive pixels out, where dense-and-mask reads 0. The two differ
wherever all active pixels of a stencil are negative, and in which of several equal zeros gets the gradient.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Call, Stencil
from ...maps import ordinary
from ..tables import remember
from . import loading

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_gradients", "conv2d_wgrad", "how", "why_not", "why_unusable"]

Size = tuple[int, int]
DTYPES = (torch.float32, torch.float64)


def why_unusable(device: str, dtype: torch.dtype) -> str | None:
    """Return why this engine cannot run on a device and dtype, or None if it can; imports MinkowskiEngine."""
    if dtype not in DTYPES:
        return f"MinkowskiEngine computes in float32 and float64, not {dtype}"
    loaded = loading.library()
    if loaded.problem is None and device == "cuda" and not loaded.cuda:
        return f"MinkowskiEngine was built for the CPU only; {loading.HOW} where torch sees the GPU"
    return loaded.problem


def why_not(call: Call) -> str | None:
    """Return why this engine cannot take a call, or None if it can."""
    if call.groups != 1 and not call.groups == call.in_channels == call.out_channels:
        return f"it takes groups=1 or depthwise, not groups={call.groups} with {call.in_channels} channels"
    return why_unusable(call.device, call.dtype)


def how(call: Call) -> str:
    """Return the method by which this engine computes a call, in a few words."""
    return "MinkowskiEngine's kernel maps" if call.groups == 1 else "sums over MinkowskiEngine's kernel maps"


class _Sites:
    """The pixels of the active patches in a coordinate manager, at one size of the patches.

    Attributes:
        key: names the coordinates in the manager.
        order: ``(rows,)`` int64, the packed row of each of MinkowskiEngine's rows; None where they are the same.
        back: the inverse of ``order``.
    """

    def __init__(self, manager: Any, slot: Tensor, coords: Tensor, size: Size, spacing: Size):
        self.size = size
        inner = [
            torch.arange(s, dtype=torch.int32, device=coords.device) * d for s, d in zip(size, spacing, strict=True)
        ]
        pitch = (size[0] * spacing[0], size[1] * spacing[1])
        image, row, column = coords[:, :, None, None].unbind(1)
        where = (image, row * pitch[0] + inner[0][:, None], column * pitch[1] + inner[1])
        given = torch.stack(torch.broadcast_tensors(*where), dim=-1).reshape(-1, 3)
        self.key, _ = manager.insert_and_map(given, list(spacing), "")
        kept = manager.get_coordinates(self.key)
        self.order = self.back = None
        if not torch.equal(kept, given):  # on a GPU the hash table decides
            image, y, x = kept.long().unbind(1)
            pixel = y % pitch[0] // spacing[0] * size[1] + x % pitch[1] // spacing[1]
            self.order = slot[image, y // pitch[0], x // pitch[1]].long() * (size[0] * size[1]) + pixel
            self.back = torch.argsort(self.order)

    def rows(self, packed: Tensor) -> Tensor:
        """Return ``(N, C, ph, pw)`` as MinkowskiEngine's ``(rows, C)``."""
        rows = packed.permute(0, 2, 3, 1).reshape(-1, packed.shape[1])
        return rows if self.order is None else rows[self.order]

    def packed(self, rows: Tensor) -> Tensor:
        """Return MinkowskiEngine's ``(rows, C)`` as ``(N, C, ph, pw)``."""
        if self.back is not None:
            rows = rows[self.back]
        return rows.view(-1, *self.size, rows.shape[1]).permute(0, 3, 1, 2)


class _Stages:
    """One coordinate manager and the sites in it, at all sizes of the patches that divide ``pitch``."""

    def __init__(self, pitch: Size, device: torch.device):
        module = loading.module()
        kind = module.CoordinateMapType.CUDA if device.type == "cuda" else module.CoordinateMapType.CPU
        self.manager = module.CoordinateManager(D=2, coordinate_map_type=kind)
        self.pitch = pitch
        self.sites: dict[Size, _Sites] = {}

    def holds(self, size: Size) -> bool:
        return all(p % s == 0 for p, s in zip(self.pitch, size, strict=True))

    def at(self, slot: Tensor, coords: Tensor, size: Size) -> _Sites:
        if size not in self.sites:
            spacing = (self.pitch[0] // size[0], self.pitch[1] // size[1])
            self.sites[size] = ordinary(_Sites)(self.manager, slot, coords, size, spacing)
        return self.sites[size]


def _stages(slot: Tensor, coords: Tensor, size: Size) -> _Stages:
    """Return the manager that serves patches of ``size`` pixels; the first one asked for serves all of its divisors."""
    made: list[_Stages] = remember(slot, ("minkowski",), list)
    found = next((stages for stages in made if stages.holds(size)), None)
    if found is None:
        found = _Stages(size, coords.device)
        made.append(found)
    return found


class _Axis(NamedTuple):
    """A kernel along one axis in MinkowskiEngine's terms: odd ones are centred, even ones begin at the site itself.

    Attributes:
        taps: of MinkowskiEngine's kernel, which may be longer than ours, with zeros.
        dilation: of MinkowskiEngine's kernel.
        first: the tap that is our first.
        step: from one of our taps to the next.
    """

    taps: int
    dilation: int
    first: int
    step: int

    @classmethod
    def of(cls, kernel: int, padding: int, dilation: int) -> _Axis:
        if padding == 0 and kernel % 2 == 0:
            return cls(kernel, dilation, 0, 1)
        reach = dilation * (kernel - 1)
        if padding % dilation == 0:
            side = max(padding, reach - padding) // dilation
            return cls(2 * side + 1, dilation, side - padding // dilation, 1)
        side = max(padding, reach - padding)
        return cls(2 * side + 1, 1, side - padding, dilation)

    def ours(self, kernel: int) -> slice:
        return slice(self.first, self.first + self.step * (kernel - 1) + 1, self.step)


class _Problem:
    """A stencil operation on the patches of a grid: from the sites ``source`` to the sites ``target``."""

    def __init__(self, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil):
        self.stencil = stencil
        stages = _stages(slot, coords, size)
        self.manager = stages.manager
        self.source = stages.at(slot, coords, size)
        self.target = stages.at(slot, coords, stencil.output_size(size))
        self.axes = [
            _Axis.of(*numbers) for numbers in zip(stencil.kernel, stencil.padding, stencil.dilation, strict=True)
        ]
        self.whole = all(axis.taps == kernel for axis, kernel in zip(self.axes, stencil.kernel, strict=True))

    @cached_property
    def geometry(self) -> tuple[Any, ...]:
        """Kernel, stride, dilation, region and offsets, as MinkowskiEngine's functions take them."""
        taps, dilation = [axis.taps for axis in self.axes], [axis.dilation for axis in self.axes]
        region = loading.module().RegionType.HYPER_CUBE
        return taps, list(self.stencil.stride), dilation, region, torch.empty(0, dtype=torch.int32)

    def kernel(self, weight: Tensor) -> Tensor:
        """Return ``(O, I, kh, kw)`` as ``(taps, I, O)``, the vertical tap fastest."""
        square = weight.permute(3, 2, 1, 0)  # (kw, kh, I, O)
        if not self.whole:
            square = weight.new_zeros(self.axes[1].taps, self.axes[0].taps, *square.shape[2:])
            self._ours(square).copy_(weight.permute(3, 2, 1, 0))
        return square.flatten(0, 1).contiguous()

    def weight(self, kernel: Tensor) -> Tensor:
        """Return ``(taps, I, O)`` as ``(O, I, kh, kw)``."""
        return self._ours(kernel.unflatten(0, (self.axes[1].taps, self.axes[0].taps))).permute(3, 2, 1, 0)

    def _ours(self, square: Tensor) -> Tensor:
        kh, kw = self.stencil.kernel
        return square[self.axes[1].ours(kw), self.axes[0].ours(kh)]

    def call(self, name: str, features: tuple[Tensor, ...], kernel: Tensor, *, backward: bool = False) -> Any:
        """Run one of MinkowskiEngine's functions from ``source`` to ``target``, transposed the other way."""
        library = loading.library()
        device = "GPU" if kernel.is_cuda else "CPU"
        mode = library.backend.ConvolutionMode  # its default on a GPU adds with atomics, in no fixed order
        keys = [self.source.key, self.target.key]
        if "Transpose" in name:
            keys.reverse()
        options = (*self.geometry, *(() if backward else (False,)), mode.COPY_GEMM if kernel.is_cuda else mode.DEFAULT)
        function = getattr(library.backend, name + device)
        return function(*features, kernel, *options, *keys, self.manager._manager)

    def pairs(self, slot: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Return for each of our taps that has any: its number (row-major), input rows and output rows."""

        def build() -> list[tuple[int, Tensor, Tensor]]:
            taps, stride, dilation, region, offset = self.geometry
            found = self.manager.kernel_map(
                *(self.source.key, self.target.key),
                **{"stride": stride, "kernel_size": taps, "dilation": dilation},
                **{"region_type": region, "region_offset": offset},
            )
            numbers = torch.arange(self.stencil.taps).view(1, 1, *self.stencil.kernel) + 1
            number_of = (self.kernel(numbers).flatten() - 1).tolist()  # -1 for a tap that is not ours
            ours = ((number_of[tap], rows.long()) for tap, rows in sorted(found.items()))
            return [(number, rows[0], rows[1]) for number, rows in ours if number >= 0]

        return remember(slot, ("minkowski pairs", self.source.size, self.stencil), build)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> Tensor:
    """Convolve ``x`` ``(N, C_in, ph, pw)`` with ``weight`` ``(C_out, C_in / groups, kh, kw)``."""
    problem = _Problem(slot, coords, (x.shape[2], x.shape[3]), stencil)
    rows = problem.source.rows(x).contiguous()
    if groups == 1:
        out = problem.call("ConvolutionForward", (rows,), problem.kernel(weight))
    else:
        taps = weight.flatten(1).t()
        out = rows.new_zeros(coords.shape[0] * problem.target.size[0] * problem.target.size[1], rows.shape[1])
        for tap, inputs, outputs in problem.pairs(slot):
            out.index_add_(0, outputs, rows[inputs] * taps[tap])
    if bias is not None:
        out += bias
    return problem.target.packed(out)


def conv2d_dgrad(
    grad: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, size: Size, stencil: Stencil, groups: int
) -> Tensor:
    """Return the input gradient ``(N, C_in, ph, pw)``: MinkowskiEngine's transposed convolution."""
    problem = _Problem(slot, coords, size, stencil)
    rows = problem.target.rows(grad).contiguous()
    if groups == 1:
        kernel = problem.kernel(weight.transpose(0, 1))
        return problem.source.packed(problem.call("ConvolutionTransposeForward", (rows,), kernel))
    taps = weight.flatten(1).t()
    out = rows.new_zeros(coords.shape[0] * size[0] * size[1], rows.shape[1])
    for tap, inputs, outputs in problem.pairs(slot):
        out.index_add_(0, inputs, rows[outputs] * taps[tap])
    return problem.source.packed(out)


def conv2d_wgrad(x: Tensor, grad: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int) -> Tensor:
    """Return the weight gradient ``(C_out, C_in / groups, kh, kw)``, summed over all active outputs.

    MinkowskiEngine has no function for it alone: :func:`conv2d_gradients` costs the same.
    """
    if groups == 1:
        weight = x.new_zeros(grad.shape[1], x.shape[1], *stencil.kernel)
        return conv2d_gradients(grad, x, weight, slot, coords, stencil, groups)[1]
    problem = _Problem(slot, coords, (x.shape[2], x.shape[3]), stencil)
    inputs_rows, outputs_rows = problem.source.rows(x), problem.target.rows(grad)
    sums = x.new_zeros(stencil.taps, x.shape[1])
    for tap, inputs, outputs in problem.pairs(slot):
        sums[tap] = (inputs_rows[inputs] * outputs_rows[outputs]).sum(0)
    return sums.t().unflatten(1, (1, *stencil.kernel))


def conv2d_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, slot: Tensor, coords: Tensor, stencil: Stencil, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients at ``x`` and ``weight``, which MinkowskiEngine computes in one pass."""
    if groups != 1:
        size = (x.shape[2], x.shape[3])
        grad_x = conv2d_dgrad(grad, weight, slot, coords, size, stencil, groups)
        return grad_x, conv2d_wgrad(x, grad, slot, coords, stencil, groups)
    problem = _Problem(slot, coords, (x.shape[2], x.shape[3]), stencil)
    features = (problem.source.rows(x).contiguous(), problem.target.rows(grad).contiguous())
    grad_x, grad_kernel = problem.call("ConvolutionBackward", features, problem.kernel(weight), backward=True)
    return problem.source.packed(grad_x), problem.weight(grad_kernel)
