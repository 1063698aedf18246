"""A kernel with everything it is started with: what the engine runs, and what tests compile without a GPU.

Triton's own start of a kernel binds the arguments by name, describes each in a string and looks the compiled kernel up
by all of them: 14 us of host time for 20 arguments. Here the compiled kernel is remembered by the few properties that
Triton compiles for, and later starts go straight to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...layout import packed_empty

__all__ = ["Launch", "Start", "as_rows", "is_interpreted", "processors", "row_major", "rows_like"]

# Versions whose compiled kernels are known to take all arguments of their function in order, constants among them. For
# AMD's cards Triton also compiles for the size of tensors, which is not among the keys here.
_DIRECT = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 8) and torch.version.hip is None
MOST_STARTS = 4096
# What was started before: the compiled kernel and the values of its constants. A memo: an entry follows from its key,
# which holds all that Triton compiles for, and whole numbers themselves instead of what it asks of them.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


@dataclass(slots=True)
class Launch:
    """One start of a kernel.

    Attributes:
        kernel: a ``@triton.jit`` function, whose constants come after all other arguments.
        grid: programs along up to three axes.
        arguments: tensors, numbers and None, in the kernel's order.
        constants: its ``tl.constexpr`` arguments by name.
        warps: per program.
        stages: of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> Any | None:
        """Start the kernel on the device of its first argument, on the current stream of that device.

        On meta tensors nothing is computed, as in PyTorch. Return the compiled kernel, if that device is the current
        one and later starts may go straight to it.
        """
        device = self.arguments[0].device
        if device.type == "meta":
            return None
        if is_interpreted(self.kernel):
            self.kernel[self.grid](*self.arguments, **self.constants)
            return None
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._start()
            return None
        return self._start()

    def _start(self) -> Any | None:
        """Start the kernel on the current stream of the current device; return it if it is remembered."""
        active: Any = driver.active
        device = active.get_current_device()
        kinds, given = [], []
        for argument in self.arguments:
            if isinstance(argument, Tensor):
                given.append(argument.data_ptr())
                kinds.append((argument.dtype, given[-1] % 16))
            else:
                given.append(argument)
                kinds.append(argument if type(argument) is int else type(argument))
        key = (self.kernel.fn, device, self.warps, self.stages, *self.constants.items(), *kinds)
        found = _compiled.get(key)
        if found is not None:
            compiled, constants = found
            grid, stream = (*self.grid, 1, 1)[:3], active.get_current_stream(device)
            if _is_watched():
                compiled[grid](*self.arguments, *constants, stream=stream)
            else:
                about = (compiled.function, compiled.packed_metadata, None, None, None)  # and no hooks
                compiled.run(*grid, stream, *about, *given, *constants)
            return compiled
        options = {"num_warps": self.warps, "num_stages": self.stages}
        compiled = self.kernel[self.grid](*self.arguments, **self.constants, **options)
        if not (_DIRECT and isinstance(compiled, CompiledKernel)):
            return None
        if len(_compiled) >= MOST_STARTS:
            _compiled.clear()
        _compiled[key] = compiled, _in_order(self)
        return compiled


def _in_order(launch: Launch) -> tuple[Any, ...]:
    """Return the values of a kernel's constants in the kernel's order."""
    return tuple(launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :])


class Start:
    """A kernel with all that it is started with but its tensors, which come first: for calls that differ in no more.

    Who keeps one answers for it that its tensors are always of the same types and on the same device, and that always
    the same ones of them are None. Their alignment and the current device are looked at in every start. Addresses are
    handed over as numbers, so that Triton's launcher need not ask each tensor, and the driver for each address.

    Args:
        kernel: as in :class:`Launch`, and so are ``grid``, ``constants``, ``warps`` and ``stages``.
        numbers: the arguments after the tensors.
    """

    __slots__ = ("_found", "_grid", "_last", "_more", "_numbers", "kernel")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 1,
    ):
        self.kernel = kernel
        self._numbers, self._more = numbers, (constants, warps, stages)
        self._grid = (*grid, 1, 1)[:3]
        self._last: tuple[Any, ...] = ()
        self._found: dict[Any, Any] = {}  # how to start it on each device, for addresses divisible by 16

    def launch(self, *tensors: Tensor | None) -> Launch:
        """Return the start with these tensors."""
        return Launch(self.kernel, self._grid, (*tensors, *self._numbers), *self._more)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Do as :meth:`Launch.run` does."""
        found, together, addresses = self._found, 0, []
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            together |= address or 0
            addresses.append(address)
        if together & 15 == 0 and found:
            active: Any = driver.active  # not before: Triton's interpreter has none
            device = active.get_current_device()
            ready = found.get(device)
            if ready is not None and not _is_watched():
                run, *about = ready
                run(*self._grid, active.get_current_stream(device), *about, *addresses, *self._last)
                return
        launch = self.launch(*tensors)
        compiled = launch.run()
        if compiled is not None and together & 15 == 0:
            active = driver.active
            self._last = *self._numbers, *_in_order(launch)
            about = (compiled.function, compiled.packed_metadata, None, None, None)  # and no hooks
            found[active.get_current_device()] = compiled.run, *about


def _is_watched() -> bool:
    """Return whether a profiler has hooks that Triton runs before or after each start."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", True) or getattr(after, "calls", True))


def is_interpreted(kernel: Any) -> bool:
    """Return whether ``TRITON_INTERPRET=1`` was set when the kernel was defined: it then runs on CPU tensors."""
    return not isinstance(kernel, JITFunction)


def row_major(slot: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps laid out row by row, as kernels read them; copies only if they are not."""
    return slot.contiguous(), coords.contiguous()


@lru_cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors to fill; without a GPU a small number, so that work is still split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def as_rows(x: Tensor) -> Tensor:
    """Return ``x`` ``(N, C, ph, pw)`` as a contiguous ``(N, ph, pw, C)``; copies only if not channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def rows_like(x: Tensor, count: int, size: tuple[int, int], channels: int) -> Tensor:
    """Return an uninitialised packed tensor ``(count, channels, *size)`` in channels_last memory."""
    return packed_empty(x, count, channels, *size)
