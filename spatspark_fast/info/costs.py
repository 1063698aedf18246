"""Say what a pretraining step costs: multiply-adds of every block, and memory."""

from collections.abc import Iterable
from typing import Protocol

import torch

from spatspark_fast.info.memory import estimate_memory
from spatspark_fast.models.choices import DecoderKind
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.macs import SparKMacs, count_macs
from spatspark_fast.models.masks import num_visible, shares
from spatspark_fast.models.spark import SparK, build_spark

__all__ = ["CostOptions", "model_costs"]

GIGA, GIB = 1e9, 2**30
CARDS = (16, 24, 80)  # GiB
SPARE = 1.5  # GiB of a GPU for CUDA, the workspaces of cuDNN, and what the allocator cannot use


class CostOptions(Protocol):
    """Say which model and which step are asked for."""

    model: str
    frames: int
    size: int
    patch: int
    decoder: DecoderKind
    decoder_width: int
    ratio: float
    decode_ratio: float
    batch: int
    precision: str


def model_costs(options: CostOptions) -> Iterable[str]:
    """Yield the lines of the report; raise `UserError` for a model or a size that does not exist."""
    size = (options.size, options.size)
    rows, columns = grid_shape(size, options.patch)
    model = build_spark(
        options.model,
        in_chans=options.frames,
        patch=options.patch,
        decoder=options.decoder,
        decoder_width=options.decoder_width,
    )
    visible = num_visible(rows * columns, options.ratio)
    yield from _macs(count_macs(model, size, *shares(model, size, visible, options.decode_ratio)), options)
    yield ""
    yield from _memory(model, options)


def _macs(macs: SparKMacs, options: CostOptions) -> Iterable[str]:
    encoder = macs.encoder
    yield "multiply-adds of one window, forward, in G             dense            active      active pairs"
    yield from (_row(f"  {block.name}", block.dense, block.active) for block in macs.blocks)
    yield _row("encoder", encoder.dense, encoder.visible, encoder.pairs)
    yield _row("densify", macs.densify, macs.active("densify"))
    yield _row(f"decoder ({options.decoder}, width {options.decoder_width})", macs.decoder, macs.active("decoder"))
    yield _row("whole model", macs.dense_step, macs.sparse_step)
    yield (
        f"saving: encoder {encoder.dense / encoder.visible:.2f}x, whole model {macs.saving:.2f}x; "
        "a backward pass costs twice the forward, in the same proportions"
    )


def _row(name: str, *macs: float) -> str:
    return f"{name:42s}" + "".join(f"{value / GIGA:18.3f}" for value in macs)


def _memory(model: SparK, options: CostOptions) -> Iterable[str]:
    precision = torch.bfloat16 if options.precision == "bf16" else torch.float32
    size = (options.size, options.size)
    memory = estimate_memory(model, size, options.ratio, options.decode_ratio, precision)
    kept = memory.weights + memory.gradients + memory.optimiser
    yield f"memory of a training step, {options.precision}, estimated (see docs/training.md)"
    yield f"{'weights, gradients, moments of the optimiser':46s}{kept / GIB:10.2f} GiB"
    yield f"{'activations of a window':46s}{memory.window / GIB:10.3f} GiB"
    yield f"{f'largest sum in a step of {options.batch} windows':46s}{memory.peak(options.batch) / GIB:10.2f} GiB"
    fitting = (f"{memory.largest_batch((card - SPARE) * GIB)} on {card} GB" for card in CARDS)
    yield f"{'largest batch (1.5 GiB left for other things)':46s}{', '.join(fitting)}"
