"""Say what a pretraining step costs: multiply-adds of every block, and memory."""

from collections.abc import Iterable

import torch
from jsonargparse import Namespace

from spatspark_fast.info.memory import StepMemory, estimate_memory
from spatspark_fast.models.macs import SparKMacs, count_step
from spatspark_fast.models.spark import build_spark

__all__ = ["model_costs"]

GIGA, GIB = 1e9, 2**30
CARDS = (16, 24, 80)  # GiB
SPARE = 1.5  # GiB of a GPU for CUDA, the workspaces of cuDNN, and what the allocator cannot use


def model_costs(options: Namespace) -> Iterable[str]:
    """Yield the lines of the report, by options with the names and groups of `pretrain`.

    Raises:
        UserError: a model or a size that does not exist.
    """
    model, size = options.model, (options.data.crop, options.data.crop)
    spark = build_spark(
        model.encoder,
        in_chans=options.data.input_length,
        patch=model.patch,
        decoder=model.decoder,
        decoder_width=model.decoder_width,
        levels=model.levels,
    )
    macs = count_step(spark, size, options.mask.ratio, model.decode_ratio)
    yield from _macs(macs, f"decoder ({model.decoder}, width {model.decoder_width})")
    yield ""
    precision = torch.bfloat16 if options.trainer.precision == "bf16" else torch.float32
    yield f"memory of a training step, {options.trainer.precision}, estimated (see docs/training.md)"
    memory = estimate_memory(spark, size, options.mask.ratio, model.decode_ratio, precision)
    yield from _memory(memory, options.data.batch_size)


def _macs(macs: SparKMacs, decoder: str) -> Iterable[str]:
    encoder = macs.encoder
    yield "multiply-adds of one window, forward, in G             dense            active      active pairs"
    yield from (_row(f"  {block.name}", block.dense, block.active) for block in macs.blocks)
    yield _row("encoder", encoder.dense, encoder.visible, encoder.pairs)
    yield _row("densify", macs.densify, macs.active("densify"))
    yield _row(decoder, macs.decoder, macs.active("decoder"))
    yield _row("whole model", macs.dense_step, macs.sparse_step)
    yield (
        f"saving: encoder {encoder.dense / encoder.visible:.2f}x, whole model {macs.saving:.2f}x; "
        "a backward pass costs twice the forward, in the same proportions"
    )


def _row(name: str, *macs: float) -> str:
    return f"{name:42s}" + "".join(f"{value / GIGA:18.3f}" for value in macs)


def _memory(memory: StepMemory, batch: int) -> Iterable[str]:
    kept = memory.weights + memory.gradients + memory.optimiser
    yield f"{'weights, gradients, moments of the optimiser':46s}{kept / GIB:10.2f} GiB"
    yield f"{'activations of a window':46s}{memory.window / GIB:10.3f} GiB"
    yield f"{f'largest sum in a step of {batch} windows':46s}{memory.peak(batch) / GIB:10.2f} GiB"
    fitting = (f"{memory.largest_batch((card - SPARE) * GIB)} on {card} GB" for card in CARDS)
    yield f"{'largest batch (1.5 GiB left for other things)':46s}{', '.join(fitting)}"
