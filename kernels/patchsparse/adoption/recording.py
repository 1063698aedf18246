"""What a parity check sees of the modules of a model: what goes in and comes out, and how far backward got."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Record", "recording", "tensors_of"]

_MARK = "patchsparse.module"


@dataclass
class Record:
    """Inputs and outputs of every call, in order of completion, and the calls that are still running.

    ``reached`` is the module whose output backward has come to last.
    """

    outputs: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    inputs: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    callers: dict[tuple[str, int], str] = field(default_factory=dict)
    running: list[tuple[str, int]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    reached: str = ""

    def start(self, path: str, module: nn.Module, args: Any) -> None:
        """Note that a module begins, and on what."""
        call = self.calls[path] = self.calls.get(path, -1) + 1
        self.callers[path, call] = self.running[-1][0] if self.running else path
        self.inputs[path, call] = _copies(args)
        self.running.append((path, call))

    def end(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Keep its output, and let backward say when it comes there."""
        self.outputs[self.running.pop()] = _copies(output)
        nodes: list[Any] = [tensor.grad_fn for tensor in tensors_of(output)]
        for node in nodes:
            if node is not None and _MARK not in node.metadata:  # a container returns what its last module returned
                node.metadata[_MARK] = path
                node.register_prehook(partial(self.reach, path))

    def reach(self, path: str, gradients: Any) -> None:
        """Note where backward is."""
        self.reached = path


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in ``tree``."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copies(tree: Any) -> list[Tensor]:
    """Return copies of the tensors in ``tree``: a later in-place operation must not change them."""
    return [tensor.detach().clone() for tensor in tensors_of(tree)]


@contextmanager
def recording(model: nn.Module, shown: set[str]) -> Iterator[Record]:
    """Record the calls of the modules ``shown`` in the block."""
    record = Record()
    handles = []
    for path, module in model.named_modules():
        if path in shown:
            handles.append(module.register_forward_pre_hook(partial(record.start, path)))
            handles.append(module.register_forward_hook(partial(record.end, path)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
