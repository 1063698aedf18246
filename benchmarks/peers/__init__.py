"""Other ways of convolving masked images, one small module each, behind one interface.

None of them is a dependency: a library is imported when it is first asked for, and is left out, with a sentence, where
it is not installed. The output and the gradients of each are checked against dense-and-mask before it is timed.
"""

from __future__ import annotations

from .base import Layer, Peer, check, passes
from .dense import Dense, DenseAndMask
from .minkowski import Minkowski
from .ocnn import Ocnn
from .packed import Packed
from .spconv import Spconv, SpconvTriton
from .warpconvnet import WarpConvNet

__all__ = [
    "Dense",
    "DenseAndMask",
    "Layer",
    "Minkowski",
    "Ocnn",
    "Packed",
    "Peer",
    "Spconv",
    "SpconvTriton",
    "WarpConvNet",
    "check",
    "passes",
    "peers",
]


def peers() -> tuple[Peer, ...]:
    """Return all peers, installed or not."""
    return Dense(), DenseAndMask(), Ocnn(), Spconv(), SpconvTriton(), WarpConvNet(), Minkowski()
