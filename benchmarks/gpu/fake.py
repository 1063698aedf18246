"""Pretend that this machine has a GPU: every Triton kernel is compiled for a named card, nothing is launched.

Two uses, both with tensors in the memory of the host that say they are on ``cuda:0`` (``fake_torch.py``):

* ``with fake_gpu("h100") as seen:`` computes PyTorch's operators for real. With tiny tensors the time that remains is
  that of the host, and ``seen`` counts what is started.
* ``with fake_gpu("h100", hollow=True) as seen:`` computes nothing that is large (``hollow.py``), so that whole programs
  run at real sizes. Kernels are specialised on the alignment of pointers and on integers that are 1 or divisible by
  16: with real sizes the compiled kernels, and so the entries of Triton's cache, are those of the real run.

Why not torch's FakeTensorMode: without a driver its ``cuda`` tensors have no backward pass (autograd asks the driver
for streams), they have no addresses, no ``.item()`` and no bytes to write to a file, and code that asks
``type(x) is Tensor`` takes another way. Tensors of memory that is reserved and never touched have none of this.

Not seen here: the time and the errors of the launch itself in the driver, and what kernels write.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import compiler, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .fake_cards import CARDS, Card
from .fake_torch import pretend
from .hollow import Hollow
from .launchers import build_launchers

__all__ = ["CARDS", "Card", "Compiled", "Seen", "fake_gpu", "install", "main"]

_numbers = itertools.count(1000)  # of devices: Triton keeps the kernels of each one apart


@dataclass(frozen=True)
class Compiled:
    """A kernel that Triton compiled, or found in its cache.

    Attributes:
        name: of the kernel.
        seconds: of the compiler; of reading if it was found.
        cached: whether it was found.
        key: its folder in the cache.
    """

    name: str
    seconds: float
    cached: bool
    key: str


@dataclass
class Seen:
    """What the fake card was asked for.

    Attributes:
        card: which one it is.
        launches: how often each Triton kernel was started.
        compiled: every kernel that was loaded, in order.
        operators: how often each operator of PyTorch that starts work was met on the card; only of hollow tensors.
        sources: kernels whose launchers Triton would build, as its compiler knows them, with their metadata.
    """

    card: Card
    launches: Counter[str] = field(default_factory=Counter)
    compiled: list[Compiled] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    sources: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def missed(self) -> list[Compiled]:
        """Kernels that were not in the cache."""
        return [c for c in self.compiled if not c.cached]

    def summary(self) -> str:
        """Return a line of text: kernels, hits of the cache, seconds of the compiler."""
        missed = self.missed
        return (
            f"{self.card.name}: {len(self.compiled)} kernels, {len(self.compiled) - len(missed)} found in the cache, "
            f"{sum(c.seconds for c in missed):.1f} s compiling, {sum(self.launches.values())} launches"
        )

    def as_json(self) -> dict[str, Any]:
        """Return all counts as plain values."""
        compiled = [asdict(c) for c in self.compiled]
        return {"compiled": compiled, "launches": dict(self.launches), "operators": dict(self.operators)}


class _Utils:
    """What Triton asks its driver about a device and a binary."""

    def __init__(self, card: Card):
        self.card = card

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return handles of module and function, registers, spills and the most threads; nothing is loaded."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Forget a module that was never loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the properties that Triton reads."""
        return {
            "max_shared_mem": self.card.shared,
            "multiprocessor_count": self.card.processors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class _Driver:
    """A driver that counts launches."""

    def __init__(self, card: Card, seen: Seen):
        self.card, self.seen, self.utils, self.number = card, seen, _Utils(card), next(_numbers)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """Return what Triton calls to start a compiled kernel."""
        self.seen.sources.append((src, metadata))
        launches, name = self.seen.launches, metadata.name

        def launch(*arguments: Any) -> None:
            launches[name] += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        major, minor = self.card.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self.card.capability


class _Uncompiled(compiler.CompiledKernel):
    """A kernel that is only counted, ready to be started."""

    def __init__(self, src: Any, launches: Counter[str]):
        name = src.fn.__name__

        def launch(*arguments: Any) -> None:
            launches[name] += 1

        self.src, self.name, self.module, self.function, self.packed_metadata = src, name, 1, 1, ()
        self._run = launch


def _listener(seen: Seen):
    def heard(*, src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
        seen.compiled.append(Compiled(metadata["name"], times.total / 1e6, cache_hit, metadata["hash"]))

    return heard


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: what it computes is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def fake_gpu(card: str = "h100", *, hollow: bool = False, compiles: bool = True) -> Iterator[Seen]:
    """Let PyTorch and Triton believe in a card inside the ``with`` block; use one card in a process.

    Args:
        card: a key of ``CARDS``.
        hollow: reserve large tensors and compute nothing on them. What moves to ``cuda`` says so, the rest stays on
            the host, and operations that mix the two fail, as on a GPU. Otherwise all tensors say ``cuda:0``.
        compiles: whether kernels are compiled; else they are only counted.

    Yields:
        what is seen, filled as it goes on.

    Raises:
        ValueError: for an unknown card.
        RuntimeError: under ``TRITON_INTERPRET=1``, where kernels are not compiled.
    """
    if card not in CARDS:
        raise ValueError(f"card {card!r} is unknown; choose one of {', '.join(CARDS)}")
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 runs kernels in Python; unset it to compile them for a fake GPU")
    seen = Seen(CARDS[card])
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(CARDS[card], seen)))
        stack.enter_context(mock.patch.object(knobs.compilation, "listener", _listener(seen)))
        stack.enter_context(pretend(CARDS[card], hollow))
        stack.enter_context(_one_thread())
        if not compiles:
            count = lambda src, *args, **kwargs: _Uncompiled(src, seen.launches)  # noqa: E731
            stack.enter_context(mock.patch.object(compiler, "compile", count))
        if hollow:
            stack.enter_context(Hollow(seen.operators))
            stack.enter_context(_unrecorded())
        yield seen


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Let calls be as eager as on a card: the mode that makes tensors hollow records nothing.

    Else every operator of `patchsparse` would take the way of a compiler's traces, which starts other kernels.
    """

    def is_traced() -> bool:
        compiles, transforms = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
        return compiles or transforms or torch._C._len_torch_dispatch_stack() > 1

    with ExitStack() as stack:
        for name in ("patchsparse.eager", "patchsparse.ops.operator", "patchsparse.functional.norm"):
            stack.enter_context(mock.patch.object(import_module(name), "is_traced", is_traced))
        yield


def install(card: str = "h100", *, hollow: bool = False) -> Seen:
    """Do as :func:`fake_gpu` for the rest of the process."""
    stack = ExitStack()
    _installed.append(stack)
    return stack.enter_context(fake_gpu(card, hollow=hollow))


_installed: list[ExitStack] = []  # keeps what was installed alive until the process ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run a module or a script with its arguments on a fake card; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.fake", description=__doc__)
    parser.add_argument("--card", choices=CARDS, default="h100", help="what to pretend (default: h100)")
    parser.add_argument("--log", type=Path, help="folder for a JSON of what the card was asked, named by the process")
    parser.add_argument("--dry", action="store_true", help="compile nothing, count launches only")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python does")
    parser.add_argument("program", help="module, or path of a script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    with fake_gpu(options.card, hollow=True, compiles=not options.dry) as seen:
        try:
            sys.argv = [options.program, *options.arguments]
            if options.module:
                sys.path.insert(0, os.getcwd())
                runpy.run_module(options.program, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(Path(options.program).parent))
                runpy.run_path(options.program, run_name="__main__")
        finally:
            sys.stdout.write(f"fake {seen.summary()}\n")
            built = build_launchers(seen.sources)
            if options.log is not None:
                options.log.mkdir(parents=True, exist_ok=True)
                (options.log / f"{os.getpid()}.json").write_text(json.dumps(seen.as_json() | {"launchers": built}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
