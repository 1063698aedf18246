"""The estimated memory of a step is what PyTorch allocates in one."""

import pytest
import torch

from benchmarks.measure.timing import peak_bytes
from spatspark_fast.info.memory import StepMemory, estimate_memory
from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.spark import SparK, build_spark

BATCH = 8


def measured(model: SparK, size: int, decode_ratio: float, precision: torch.dtype) -> int:
    """Return the peak of a real step above weights and moments, from the second one on."""
    masks = MaskSampler(ratio=0.6)
    frames = torch.rand(BATCH, model.in_chans, size, size)

    def step() -> None:
        grid, decoded = masks_of_step(model, masks, frames, decode_ratio)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = model(frames, grid, decoded).loss
        loss.backward()

    step()  # what is made once does not count
    model.zero_grad(set_to_none=True)
    return peak_bytes(step) + frames.nbytes


@pytest.mark.parametrize(
    ("decoder", "width", "decode_ratio", "precision", "tolerance"),
    [
        pytest.param("unet", 64, 1.0, torch.float32, 0.02, marks=pytest.mark.rest),
        ("unet", 64, 0.25, torch.float32, 0.05),
        ("light", 64, 1.0, torch.float32, 0.02),
        pytest.param("unet", 64, 1.0, torch.bfloat16, 0.05, marks=pytest.mark.rest),
    ],
)
def test_the_estimate_is_the_measured_peak(
    decoder: str, width: int, decode_ratio: float, precision: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = build_spark("resnet10t", in_chans=6, decoder=decoder, decoder_width=width)  # type: ignore[arg-type]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    memory = estimate_memory(model, (192, 192), 0.6, decode_ratio, precision, samples=(BATCH, 2 * BATCH))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    estimate = memory.step + BATCH * memory.window
    assert estimate == pytest.approx(measured(model, 192, decode_ratio, precision), rel=tolerance)
    parameters = sum(p.numel() for p in model.parameters()) * 4
    assert (memory.gradients, memory.optimiser) == (parameters, 2 * parameters)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    memory = StepMemory(weights=100, gradients=100, optimiser=200, scratch=100, step=50, window=7)
    for budget in (500, 1000, 1006, 1007):
        batch = memory.largest_batch(budget)
        assert batch == 0 or memory.peak(batch) <= budget < memory.peak(batch + 1)
    assert memory.largest_batch(400) == 0
    assert memory.peak(1) == 500, "a small step is bound by the optimiser"
