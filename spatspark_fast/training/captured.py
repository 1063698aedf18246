"""A whole training step as one graph: masks, forward, backward, clipping, optimiser, average.

A step is a function of tensors that keep their place: the frames, and one row of numbers (the random numbers of the
masks, and the rates of the optimiser). Before each step both are copied there, and the graph of the step is replayed.
What decides the shapes of tensors makes another graph: how many patches are visible, and whether a batch begins or
ends an optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from patchsparse.capturing import reason_of
from spatspark_fast.training.comparison import copies, differences, numbers, ways_apart
from spatspark_fast.training.device_rates import Movable
from spatspark_fast.training.lamb import clip_gradients

__all__ = ["CapturedStep", "Graphs", "Inputs", "Taken"]

WARM_UP = 2  # steps of each kind that run kernel by kernel before one is captured: they make what is made only once
KEPT = 8  # graphs
PATIENCE = 200  # steps that a graph must rest before another kind of step may take its place


_torch: Any = torch  # type checkers do not know its kernels for lists of tensors


class Inputs(NamedTuple):
    """Hold what a batch gives to a step.

    ``frames`` are on the device, the random numbers ``noise`` (float32) on the CPU. ``counts`` decide the shapes of
    tensors, and ``what`` says them in words.
    """

    frames: Tensor
    noise: tuple[Tensor, ...] = ()
    counts: tuple[int, ...] = ()
    what: str = "whole images"


class Taken(NamedTuple):
    """Hold what came of a step, scalars on the device: the loss and, where a step of the optimiser ends, the norm."""

    loss: Tensor
    norm: Tensor | None


class Graphs(Protocol):
    """Say what captures and replays steps; `spatspark_fast.training.cuda_graphs` has that of a GPU."""

    def beside(self) -> AbstractContextManager[None]:
        """Let what runs inside run kernel by kernel, in the same queue in which it will be captured."""
        ...

    def capture(self, run: Callable[[], Taken]) -> tuple[Callable[[], None], Taken]:
        """Return a function that replays ``run``, and what its replays write; nothing is computed yet."""
        ...

    def send(self, numbers: Tensor, place: Tensor) -> None:
        """Copy numbers of the CPU to their place on the device, without waiting for it."""
        ...

    def same_dice(self) -> AbstractContextManager[None]:
        """Leave the random generators as they were before."""
        ...

    def short_of_memory(self) -> bool:
        """Tell whether a step that is not captured may find too little memory beside the graphs."""
        ...

    def forget(self) -> None:
        """Give the memory of graphs back that are no more."""
        ...


class _Places(NamedTuple):
    """Hold the tensors that a step reads; ``noise`` and ``rates`` are parts of ``numbers``."""

    frames: Tensor
    numbers: Tensor
    noise: list[Tensor]
    rates: Tensor


class _Kind(NamedTuple):
    """Say what a step has in common with all others of its graph."""

    counts: tuple[int, ...]
    places: Hashable
    begins: bool
    ends: bool
    decays: tuple[bool, ...]


class _Graph:
    """Hold a captured step, and when it was replayed last."""

    def __init__(self, replay: Callable[[], None], taken: Taken, used: int) -> None:
        self.replay = replay
        self.taken = taken
        self.used = used


Loss = Callable[[Tensor, Sequence[Tensor], tuple[int, ...]], Tensor]


class CapturedStep:
    """Train a model step by step, each one as a replayed graph.

    The first steps of each kind run kernel by kernel: they are steps of the training like all others. Then the step
    is captured and compared with itself kernel by kernel; what stands is the latter. Where that fails or differs, all
    steps go on kernel by kernel, and ``say`` is told why. The numbers are those of the same step without graphs.

    Args:
        model: what is trained, with all buffers that a step moves
        loss: the loss of ``frames`` under ``noise``, both on the device, and ``counts``, as in `Inputs`
        optimizer: what moves the weights
        graphs: what captures and replays
        clip: largest norm of the gradient, or None
        average: average of the model that moves with it
        accumulate: batches of one optimiser step; the loss of each counts by its share
        say: is told what is captured
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Movable,
        graphs: Graphs,
        *,
        clip: float | None = None,
        average: AveragedModel | None = None,
        accumulate: int = 1,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.graphs = graphs
        self.clip = clip
        self.average = average
        self.accumulate = accumulate
        self.say = say
        self.parameters = [*model.parameters()]
        self.given_up = False
        self.replayed = 0
        self._step = 0
        self._places: dict[Hashable, _Places] = {}
        self._captured: dict[_Kind, _Graph] = {}
        self._warm: dict[_Kind, int] = {}
        self._crowded = False

    def __call__(self, inputs: Inputs, begins: bool = True, ends: bool = True) -> Taken:
        """Train one batch; it ``begins`` and ``ends`` a step of the optimiser unless gradients accumulate.

        What is returned lies where the next step of the same kind will write.
        """
        rates = self.optimizer.advance() if ends else [(0.0, 0.0, 0.0)] * len(self.optimizer.param_groups)
        places = self._send(inputs, rates)
        kind = _Kind(inputs.counts, _form(inputs), begins, ends, tuple(decay != 0 for _, decay, _ in rates))
        self._step += 1
        graph = self._captured.get(kind)
        if graph is None:
            return self._uncaptured(kind, places, inputs.what)
        graph.used = self._step
        graph.replay()
        self.replayed += 1
        return graph.taken

    def _send(self, inputs: Inputs, rates: Sequence[Sequence[float]]) -> _Places:
        """Copy what a step reads to where it reads it."""
        form = _form(inputs)
        places = self._places.get(form)
        if places is None:
            places = self._places[form] = _make_places(inputs, len(rates))
        table = torch.tensor(rates, dtype=torch.float32)
        self.graphs.send(torch.cat([*(noise.flatten() for noise in inputs.noise), table.flatten()]), places.numbers)
        places.frames.copy_(inputs.frames, non_blocking=True)
        return places

    def _uncaptured(self, kind: _Kind, places: _Places, what: str) -> Taken:
        """Run a step that has no graph yet, and give it one if it is time."""
        warm = self._warm[kind] = self._warm.get(kind, 0) + 1
        if self._captured and self.graphs.short_of_memory():
            self._drop()
        if warm > WARM_UP and not self.given_up and self._room():
            try:
                return self._capture(kind, places, what)
            except Exception as error:  # whatever it was, nothing of the training is lost: nothing has run yet
                self._give_up(reason_of(error))
        return self._run(kind, places)

    def _run(self, kind: _Kind, places: _Places) -> Taken:
        with self.graphs.beside():
            taken = self._body(kind, places)
        self._let_go()
        return taken

    def _capture(self, kind: _Kind, places: _Places, what: str) -> Taken:
        """Capture a step; compare it with the step kernel by kernel, which is the one that stands."""
        state = self._state()
        replay, captured = self.graphs.capture(lambda: self._body(kind, places))
        self._let_go()
        before = copies(state)
        with self.graphs.same_dice():
            replay()
        after = copies(state)
        results = numbers(captured._asdict())
        for tensors, values in zip(state.values(), before.values(), strict=True):
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        taken = self._run(kind, places)
        differ = differences(results, numbers(taken._asdict())) + ways_apart(state, before, after)
        if differ:
            self._give_up(f"the first replay differs from the step kernel by kernel ({', '.join(differ)})")
        else:
            self._captured[kind] = _Graph(replay, captured, self._step)
            part = "" if kind.begins and kind.ends else ", one of several batches of an optimiser step"
            self.say(f"Captured a training step as a graph: {what}{part}; {len(self._captured)} kept")
        return taken

    def _body(self, kind: _Kind, places: _Places) -> Taken:
        """Take the step: all that a graph holds."""
        if kind.begins:
            self._clear()
        torch.clear_autocast_cache()  # weights in half precision that an earlier step has cast
        loss = self.loss(places.frames, places.noise, kind.counts)
        torch.clear_autocast_cache()
        with torch.autocast(places.frames.device.type, enabled=False):
            (loss if self.accumulate == 1 else loss / self.accumulate).backward()
            norm = None
            if kind.ends:
                norm = clip_gradients(self.parameters, self.clip)
                self.optimizer.move(places.rates, kind.decays)
                if self.average is not None:
                    self.average.update_parameters(self.model)
        return Taken(loss.detach(), norm)

    def _clear(self) -> None:
        """Forget the gradients; those that several batches add to keep their place."""
        if self.accumulate == 1:
            for parameter in self.parameters:
                parameter.grad = None
            return
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if grads:
            _torch._foreach_zero_(grads)

    def _let_go(self) -> None:
        """Leave the memory of gradients to others, where no later batch adds to them."""
        if self.accumulate == 1:
            self._clear()

    def _state(self) -> dict[str, list[Tensor]]:
        """Return all tensors that a step moves, by what they are."""
        average = [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]
        states = [state for state in map(self.optimizer.state.get, self.parameters) if state]
        found: dict[str, Iterable[Tensor]] = {
            "weights": self.parameters,
            "buffers": self.model.buffers(),
            "averages": average,
            "first moments": [state["exp_avg"] for state in states],
            "second moments": [state["exp_avg_sq"] for state in states],
            "gradients": [p.grad for p in self.parameters if p.grad is not None],
        }
        return {name: [tensor.detach() for tensor in tensors] for name, tensors in found.items()}

    def _room(self) -> bool:
        """Make room for one more graph; where all are in use there is none."""
        if len(self._captured) < KEPT:
            return True
        oldest = min(self._captured, key=lambda kind: self._captured[kind].used)
        if self._step - self._captured[oldest].used > PATIENCE:
            del self._captured[oldest]
            return True
        if not self._crowded:
            self._crowded = True
            self.say(f"More than {KEPT} kinds of training steps take turns: the others run kernel by kernel")
        return False

    def _drop(self) -> None:
        self._captured.clear()
        self.graphs.forget()

    def _give_up(self, reason: str) -> None:
        self.given_up = True
        self._let_go()
        self._drop()
        self.say(f"Training steps run kernel by kernel, without a CUDA graph: {reason}")


def _form(inputs: Inputs) -> Hashable:
    """Return what decides where the inputs of a step lie."""
    return tuple(inputs.frames.shape), inputs.frames.dtype, tuple(tuple(noise.shape) for noise in inputs.noise)


def _make_places(inputs: Inputs, groups: int) -> _Places:
    sizes = [noise.numel() for noise in inputs.noise]
    numbers = inputs.frames.new_empty(sum(sizes) + 3 * groups, dtype=torch.float32)
    *parts, rates = numbers.split([*sizes, 3 * groups])
    noise = [part.view(each.shape) for part, each in zip(parts, inputs.noise, strict=True)]
    return _Places(torch.empty_like(inputs.frames), numbers, noise, rates.view(groups, 3))
