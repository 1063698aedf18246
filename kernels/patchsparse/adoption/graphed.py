"""A sparsified model as CUDA graphs in a training loop of one's own: :func:`graphed`.

On a fast GPU the host takes longer to start the kernels of a packed model than the GPU to run them. PyTorch's
``torch.cuda.make_graphed_callables`` captures forward and backward once and replays them. What is added here: the mask
is an input, nothing of the model or of the random state is moved by the capture, gradients get memory of their own,
and what a replay could not do is refused.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ..capturing import reason_of, undisturbed
from ..grid import PatchGrid
from ..packing import pack
from .binding import bind, bindings_of

__all__ = ["Run", "computation", "graphed"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WARM_UP = 3  # runs before a capture
_torch: Any = torch  # type checkers do not know its kernels for lists of tensors


class Run:
    """Call a model on the packed patches of images, kernel by kernel.

    Attributes:
        model: what is called.
        captured: whether calls replay CUDA graphs.
        reason: why they do not; "" if they do.
    """

    captured = False

    def __init__(self, model: nn.Module, reason: str):
        self.model = model
        self.reason = reason

    def __call__(self, images: Tensor, grid: PatchGrid) -> Any:
        """Return what ``with bind(model, grid): model(pack(images, grid))`` returns."""
        with bind(self.model, grid):
            return self.model(pack(images, grid))


def graphed(model: nn.Module, images: Tensor, grid: PatchGrid) -> Run:
    """Capture forward and backward of a sparsified ``model`` as CUDA graphs, and return what replays them.

    ``run = graphed(model, images, grid)`` once, then ``features = run(images, grid)`` in every step instead of
    ``with bind(model, grid): model(pack(images, grid))``. Backward and optimiser are as ever. Each call may bring other
    images and another grid, with shapes, dtype and number of active patches as captured. Gradients accumulate in the
    parameters, and in images if those given here require them. Random layers draw anew in every call.

    What the capture does: it runs the model three times, then puts buffers and random generators back. Under
    ``torch.autocast`` the graph computes as that says, and must be called under the same. Do it before other threads
    use the GPU (a data loader that pins memory), or the capture may fail.

    What differs from an ordinary call:

    - The next call writes over the features of this one: ``clone()`` what must last. Call backward once, before it.
    - Features may not be changed in place before backward: it reads them, and then raises.
    - All calls share one memory, and so come from the thread that captured.
    - A feature map that the loss leaves out gives its parameters gradients of 0, not None.
    - Parameters and buffers must stay where they are: ``load_state_dict`` keeps them there, ``model.to`` may not.
    - In another mode than the captured one (``model.eval()``) the model is called as usual, kernel by kernel.
    - Python in the model runs at the capture alone. There is no second derivative.

    What is kept for as long as the result lives, in one pool of memory: all activations and what backward needs beside
    them, gradients of features and parameters, and a copy of images and maps. Call it once for each shape.

    Args:
        model: module that holds at least one sparsified part; it is not changed, and is called with one argument.
        images: ``(B, C, H, W)`` on the model's device, of any dtype that it takes.
        grid: B images, on the same device.

    Returns:
        a callable of images and grid. Elsewhere than on a CUDA device it runs the model as usual: ``captured`` is
        False, and ``reason`` says why.

    Raises:
        ValueError: if no part of ``model`` is sparsified, or it has what a replay would leave out (hooks of modules,
            an exchange with other processes); in a call, for other shapes, dtypes or states than the captured ones.
        RuntimeError: if the capture fails, with the reason; in a call, from another thread; in backward, if another
            call came before it or a feature was changed.
    """
    with bind(model, grid):
        pass  # says what is wrong with either
    if images.device.type != "cuda":
        return Run(model, f"a CUDA graph needs a GPU, and the images are on {images.device}")
    _refuse(model)
    return _Replayed(model, images, grid)


def computation(model: nn.Module) -> Any:
    """Return the packed call of ``model`` as a function of images, the maps of a grid, and all parameters in order.

    What engines remember of a grid they remember of its slot map, so it gets a new one in each call: a capture then
    holds the kernels that build tables from the map, and no table of the grid before.
    """
    names = [name for name, _ in model.named_parameters()]

    def compute(images: Tensor, active: Tensor, coords: Tensor, slot: Tensor, *parameters: Tensor) -> Any:
        grid = PatchGrid(active, coords, slot.view(slot.shape))
        with bind(model, grid):
            return functional_call(model, dict(zip(names, parameters, strict=True)), (pack(images, grid),))

    return compute


class _Replayed(Run):
    """Replay the graphs of a model; ``turn`` counts the calls, and 0 says that backward has used the last one up."""

    captured = True

    def __init__(self, model: nn.Module, images: Tensor, grid: PatchGrid):
        super().__init__(model, "")
        self._modules = [*model.modules()]
        self._parameters = [*model.parameters()]
        self._modes = self._modes_now()
        self._trained = self._trained_now()
        self._form = _form(images, grid)
        self._autocast = _autocast()
        self._moves = [images.requires_grad, *self._trained]
        self.turn, self._calls = 0, 0
        self._thread = threading.get_ident()
        self._features: list[tuple[Tensor, int]] = []  # of the last call, and their versions
        self._replay = self._captured(images, grid)

    def __call__(self, images: Tensor, grid: PatchGrid) -> Any:
        """Return what ``with bind(model, grid): model(pack(images, grid))`` returns, by a replay."""
        if self._modes_now() != self._modes:
            return super().__call__(images, grid)
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "a replay writes where the thread that captured it may be reading; "
                "call graphed(model, images, grid) in each thread that runs the model"
            )
        self._check(images, grid)
        self._calls += 1
        self.turn = self._calls
        tensors = [images, *self._parameters]
        moving = [tensor for tensor, moves in zip(tensors, self._moves, strict=True) if moves]
        apart = iter(cast(Any, _Apart).apply(self, self.turn, *moving) if moving else ())
        images, *parameters = (next(apart) if moves else t for t, moves in zip(tensors, self._moves, strict=True))
        output = self._replay(images, grid.active, grid.coords, grid.slot, *parameters)
        if torch.is_grad_enabled():
            self._features = [(f.detach(), f._version) for f in tree_leaves(output) if isinstance(f, Tensor)]
        return output

    def changed(self) -> bool:
        """Return whether a feature of the last call was changed in place since."""
        return any(feature._version != version for feature, version in self._features)

    def _captured(self, images: Tensor, grid: PatchGrid) -> Any:
        """Return the callable of PyTorch's, whose inputs are those of `computation`.

        Parameters come as tensors of the same memory, so that no node of autograd that belongs to them becomes part of
        a capture, in whatever stream it was made.
        """
        compute, (enabled, dtype) = computation(self.model), self._autocast
        gradient = images.requires_grad

        def forward(*inputs: Tensor) -> Any:  # backward is captured without autocast, as it should run
            with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
                return compute(*inputs)

        with torch.inference_mode(False), torch.enable_grad(), _nothing_moved(self.model, images.device):
            parameters = [p.detach().requires_grad_(p.requires_grad) for p in self._parameters]
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.register_hook(partial(_laid_out, parameter.shape, parameter.stride()))
            places = [t.detach().clone() for t in (images, grid.active, grid.coords, grid.slot)]
            places[0].requires_grad_(gradient)
            try:
                with undisturbed(images.device), torch.autocast("cuda", enabled=False):
                    inputs, pool = (*places, *parameters), torch.cuda.graph_pool_handle()
                    _warm_up(forward, inputs)
                    options: dict[str, Any] = {"num_warmup_iters": 0, "allow_unused_input": True, "pool": pool}
                    return cast(Any, torch.cuda.make_graphed_callables)(forward, inputs, **options)
            except Exception as error:
                raise RuntimeError(
                    f"{type(self.model).__name__} could not be captured: {reason_of(error)}. "
                    "Call it with bind(model, grid) instead"
                ) from error

    def _modes_now(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _trained_now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]

    def _check(self, images: Tensor, grid: PatchGrid) -> None:
        """Raise ValueError if a replay would not do what a call does."""
        found = _form(images, grid)
        again = "call graphed(model, images, grid) again for this one"
        for name, now, before in zip(found, found.values(), self._form.values(), strict=True):
            if now != before:
                raise ValueError(f"{name} is {_words(now)}, and the graph was captured for {_words(before)}; {again}")
        if (now := _autocast()) != self._autocast:
            raise ValueError(
                f"autocast is {_cast_words(now)}, and the graph was captured with {_cast_words(self._autocast)}; "
                f"{again} inside of torch.autocast as it is called"
            )
        if images.requires_grad and not self._moves[0]:
            raise ValueError(f"images require a gradient, and the graph was captured for images that do not; {again}")
        if self._trained_now() != self._trained:
            raise ValueError(f"the model has parameters that were frozen or freed since the capture; {again} state")


class _Apart(torch.autograd.Function):
    """Give gradients memory of their own, and refuse those of a call whose activations are gone.

    The graph of backward always writes to the same places. A parameter without a gradient would keep such a place as
    its gradient, and the next replay would write there before it is added.
    """

    @staticmethod
    def forward(ctx: Any, run: _Replayed, turn: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.turn = run, turn
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.run.turn != ctx.turn:
            raise RuntimeError(
                "backward of a replayed call came twice, or after a later call that wrote over its activations; call "
                "backward once after each call, or capture one graphed(model, images, grid) for each call of a step"
            )
        if ctx.run.changed():
            raise RuntimeError(
                "a feature of a replayed call was changed in place, and the graph of backward may read it; change a "
                "clone() of it, or compute out of place"
            )
        ctx.run.turn = 0
        places = [gradient for gradient in gradients if gradient is not None]
        own = iter(_torch._foreach_mul(places, 1.0) if places else ())  # a copy of all by few kernels
        return None, None, *(None if gradient is None else next(own) for gradient in gradients)


def _laid_out(shape: Sequence[int], strides: Sequence[int], gradient: Tensor) -> Tensor:
    """Return a gradient in the memory layout of its parameter, so that autograd takes it without a copy."""
    axes = zip(shape, strides, gradient.stride(), strict=True)
    if all(size == 1 or wanted == found for size, wanted, found in axes):
        return gradient
    return gradient.new_empty_strided(shape, strides).copy_(gradient)


def _warm_up(forward: Any, inputs: Sequence[Tensor]) -> None:
    """Run forward and backward on a side stream until nothing is made for the first time.

    PyTorch would do it as well, but keeps the last outputs. Their nodes of autograd belong to the stream of the warm-up
    and would become part of the capture in another one.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            outputs = [output for output in tree_leaves(forward(*inputs)) if output.requires_grad]
            if outputs:
                needed = [tensor for tensor in inputs if tensor.requires_grad]
                torch.autograd.grad(outputs, needed, [torch.zeros_like(o) for o in outputs], allow_unused=True)
    current.wait_stream(side)
    gc.collect()  # what is left in circles would die in the capture


def _refuse(model: nn.Module) -> None:
    """Raise ValueError for what would be left out of a replay."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel exchanges gradients, which no graph holds; give graphed its module"
            )
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has hooks, which would run at the capture alone; "
                "remove them, or call the model with bind(model, grid)"
            )
    if any(binding.all_gather is not None for binding in bindings_of(model)):
        raise ValueError(
            "the batch norms exchange statistics with other processes, which no graph holds; "
            "call join_statistics(model, None), or call the model with bind(model, grid)"
        )


def _form(images: Tensor, grid: PatchGrid) -> dict[str, Any]:
    """Return what a graph is made for, by the words of an error."""
    return {
        "images": images.shape,
        "dtype of images": images.dtype,
        "device of images": images.device,
        "device of grid": grid.device,
        "grid (B, Gh, Gw)": grid.slot.shape,
        "number of active patches of grid": grid.num_active,
    }


def _words(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _autocast() -> tuple[bool, torch.dtype | None]:
    """Return whether autocast is on for GPUs, and to which dtype."""
    enabled = torch.is_autocast_enabled("cuda")
    return enabled, torch.get_autocast_dtype("cuda") if enabled else None


def _cast_words(state: tuple[bool, torch.dtype | None]) -> str:
    return f"on ({state[1]})" if state[0] else "off"


@contextmanager
def _nothing_moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers and random generators as they were before."""
    buffers = [buffer.detach() for buffer in model.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng(devices=[device.index]):
            yield
    finally:
        _put_back(buffers, before)


def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
