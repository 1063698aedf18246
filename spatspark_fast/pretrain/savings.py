"""Say what the sparse path saves against dense-and-mask: counted in multiply-adds, and measured on the spot.

Dense-and-mask is SparK's published way: the whole image goes through every layer, see
`patchsparse.testing.DenseAndMask`.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack
from patchsparse.precision import exact_float32
from patchsparse.testing import DenseAndMask
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.inputs import scale_input
from spatspark_fast.models.macs import count_step
from spatspark_fast.models.masks import num_visible
from spatspark_fast.models.spark import SparK

__all__ = ["Measurement", "counted_savings", "describe_savings", "measure_encoder"]

GIGA = 1e9
PARITY = 1e-3  # largest difference of features, as a share of the largest feature, at which times are compared


@dataclass
class Measurement:
    """Hold seconds per encoder step (forward, backward) of both ways, and how far their features differ."""

    sparse: float
    dense: float
    difference: float
    rounds: int
    batch: int

    @property
    def ratio(self) -> float:
        """Return how many times faster the sparse way was."""
        return self.dense / self.sparse


def measure_encoder(
    model: SparK, frames: Tensor, grid: PatchGrid, rounds: int = 3, precision: torch.dtype = torch.float32
) -> Measurement:
    """Time encoder steps of both ways in turn, after comparing their features; medians in seconds.

    The model is copied, not changed. Where the features differ no times are taken: both are NaN.
    """
    sparse, dense = copy.deepcopy(model.encoder).train(), DenseAndMask(model.encoder, grid).train()
    seen = scale_input(frames, model.input_scaling)

    def run_sparse() -> Sequence[Tensor]:
        with bind(sparse, grid):
            return sparse(pack(seen, grid))

    def run_dense() -> Sequence[Tensor]:
        return dense(seen)

    with torch.no_grad(), exact_float32():
        ours, theirs = (_drawn_alike(run) for run in (run_sparse, run_dense))
        difference = max(_difference(a, pack(b, grid)) for a, b in zip(ours, theirs, strict=True))
    if not difference <= PARITY:
        return Measurement(float("nan"), float("nan"), difference, 0, len(frames))

    def step(way: nn.Module, run: Callable[[], Sequence[Tensor]]) -> float:
        way.zero_grad(set_to_none=True)
        _wait(frames.device)
        started = time.perf_counter()
        with torch.autocast(frames.device.type, dtype=precision, enabled=precision != torch.float32):
            loss = torch.stack([feature.float().mean() for feature in run()]).sum()
        loss.backward()
        _wait(frames.device)
        return time.perf_counter() - started

    times = [(step(sparse, run_sparse), step(dense, run_dense)) for _ in range(rounds + 1)][1:]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return Measurement(ours, theirs, difference, rounds, len(frames))


def _drawn_alike(run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Run with random numbers that are the same in every call: of dropped paths, which are whole images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_savings(
    model: SparK,
    frames: Tensor,
    ratio: float,
    precision: torch.dtype = torch.float32,
    decode_ratio: float = 1.0,
) -> str:
    """Say in two lines what this configuration saves: multiply-adds, and seconds measured here and now."""
    size = (frames.shape[2], frames.shape[3])
    shape = grid_shape(size, model.patch)
    visible = num_visible(shape[0] * shape[1], ratio)
    counted = _counted(model, size, ratio, decode_ratio)
    generator = torch.Generator().manual_seed(0)
    grid = PatchGrid.random(len(frames), shape, visible, generator=generator).to(frames.device)
    on_cpu = frames.device.type == "cpu"
    found = measure_encoder(model, frames, grid, rounds=3 if on_cpu else 20, precision=precision)
    if found.rounds == 0:
        return f"{counted}\nNot measured: dense-and-mask gives other features here (by {found.difference:.1g})."
    where = f"{torch.get_num_threads()} CPU threads" if on_cpu else torch.cuda.get_device_name(frames.device)
    return (
        f"{counted}\nMeasured here and now ({where}, {str(precision).removeprefix('torch.')}, batch "
        f"{found.batch}, encoder forward + backward, median of {found.rounds}): {found.sparse:.3g} s "
        f"instead of {found.dense:.3g} s dense-and-mask, {found.ratio:.2f}x as fast; features equal to "
        f"{found.difference:.0e}."
    )


def counted_savings(model: SparK, size: tuple[int, int], ratio: float, decode_ratio: float = 1.0) -> dict[str, float]:
    """Return forward multiply-adds of one window in G, dense-and-mask and sparse, as plain values for a record."""
    macs = count_step(model, size, ratio, decode_ratio)
    return {
        "encoder_dense": macs.encoder.dense / GIGA,
        "encoder_sparse": macs.encoder.visible / GIGA,
        "model_dense": macs.dense_step / GIGA,
        "model_sparse": macs.sparse_step / GIGA,
    }


def _counted(model: SparK, size: tuple[int, int], ratio: float, decode_ratio: float) -> str:
    macs, giga = count_step(model, size, ratio, decode_ratio), GIGA
    encoder = macs.encoder
    return (
        f"Counted, one {size[0]}x{size[1]} window, {100 * (1 - encoder.visible / encoder.dense):.0f} % hidden, "
        "forward: the "
        f"encoder does {encoder.visible / giga:.2f} G multiply-adds on visible patches instead of "
        f"{encoder.dense / giga:.2f} G dense-and-mask, {encoder.dense / encoder.visible:.2f}x fewer; "
        f"the whole model {macs.sparse_step / giga:.2f} instead of {macs.dense_step / giga:.2f} G, "
        f"{macs.saving:.2f}x fewer."
    )
