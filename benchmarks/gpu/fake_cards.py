"""The cards that can be pretended, with what Triton and PyTorch ask of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CARDS", "Card"]


@dataclass(frozen=True)
class Card:
    """A GPU as its owner knows it.

    Attributes:
        name: as PyTorch prints it.
        capability: compute capability, major and minor.
        processors: multiprocessors.
        shared: bytes of shared memory that one block can have.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int
    memory: int


# From the "Technical Specifications" table of NVIDIA's CUDA C++ Programming Guide and the data sheets of the cards.
CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10, 80 << 30),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 99 << 10, 24 << 30),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 99 << 10, 24 << 30),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10, 80 << 30),
    "h200": Card("NVIDIA H200", (9, 0), 132, 227 << 10, 141 << 30),
    "b200": Card("NVIDIA B200", (10, 0), 148, 227 << 10, 180 << 30),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 99 << 10, 32 << 30),
}
