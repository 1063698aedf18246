"""Peak memory: of an encoder's activations, of a whole step, and the largest batch that fits a GPU."""

from __future__ import annotations

from spatspark_fast.info.memory import StepMemory, estimate_memory

from .measure.scales import MASKED
from .measure.timing import Ratio, peak_bytes
from .subjects.encoders import DENSE, DENSE_AND_MASK, encoders
from .subjects.step_ways import DECODE_RATIO, OURS, RIVALS, case_of, check_equal, make_step
from .subjects.steps import peak

MIB, GIB = 2**20, 2**30
CARDS, SPARE = (16, 24, 80), 1.5  # GiB, and what is left of them for CUDA and the workspaces of cuDNN


def test_encoder_memory(benchmark, record, scale):
    """Peak bytes of forward + backward above the parameters and their gradients, which all ways share."""
    ways = encoders(scale.encoders[0], ("auto", "gather"), MASKED, scale)
    ways.check()
    for step in ways.steps.values():
        step()  # allocate the weight gradients, which stay
    peaks = {name: peak_bytes(step, scale.device) / MIB for name, step in ways.steps.items()}
    for engine in ("auto", "gather"):
        for rival in (DENSE, DENSE_AND_MASK):
            ratio, values = Ratio.exact(peaks[rival] / peaks[engine]), (peaks[engine], peaks[rival])
            record("encoder_memory", ways.case, engine, rival, ratio, values, "MiB", masked=MASKED)
    benchmark.pedantic(ways.steps["auto"], rounds=1)


def test_step_memory(benchmark, record, scale, step_encoder):
    """Peak memory of a step against both rivals, and how far the estimate of ``spatspark_fast.info`` is from it."""
    scale = scale.for_encoder(step_encoder)
    assert not check_equal(step_encoder, scale)
    case = case_of(step_encoder, scale)
    rivals = {way: peak(make_step(way, step_encoder, scale), scale.device) for way in RIVALS}
    for way in OURS:
        step = make_step(way, step_encoder, scale)
        own = peak(step, scale.device)
        for rival, theirs in rivals.items():
            record("step_memory", case, way, rival, Ratio.exact(theirs / own), (own, theirs), "MiB", masked=MASKED)
        ratio, size = DECODE_RATIO if way == OURS[1] else 1.0, (scale.size, scale.size)
        samples = (scale.batch, max(32, 2 * scale.batch))
        memory = estimate_memory(step.model, size, MASKED, ratio, scale.precision, samples)
        estimate = max(memory.step + scale.batch * memory.window, memory.gradients + memory.scratch) / MIB
        record("step_memory", case, way, "estimate", Ratio.exact(estimate / own), (own, estimate), "MiB", masked=MASKED)
        _record_largest(record, case, way, memory)
    benchmark.pedantic(lambda: None, rounds=1)


def _record_largest(record, case: str, way: str, memory: StepMemory) -> None:
    """Record the largest batch on GPUs, estimated, over that of the smallest."""
    fits = [memory.largest_batch((card - SPARE) * GIB) for card in CARDS]
    for card, batch in zip(CARDS, fits, strict=True):
        ratio = Ratio.exact(batch / max(fits[0], 1))
        name = f"{case.split(' batch')[0]} largest batch on {card} GB"
        record("step_memory", name, way, f"{CARDS[0]} GB", ratio, (batch, fits[0]), "windows", masked=MASKED)
