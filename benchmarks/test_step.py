"""The whole training step: data, forward, backward, clipping and LAMB; ours against the published way.

The published way is dense-and-mask in NCHW, eager, with the exact decoder; times are taken only after both ways gave
the same loss and the same norm of the gradient. Sparse decoding and the light decoder train other objectives, which
docs/training.md compares by what they learn.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.resident import OnHost
from spatspark_fast.data.store import in_memory
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.masks import MaskSampler
from spatspark_fast.training.lamb import clip_gradients
from spatspark_fast.training.memory import estimate_memory

from .steps import MASKED, OurStep, Published, PublishedStep, Step, build, windows_on
from .timing import Ratio, in_turn, peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 4
PRECISION = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # of ours; the published way is float32
SIZE, FRAMES, WIDTH, LIGHT = 288, 12, 768, 512
ENCODERS = ("resnet18", "resnet50", "convnext_base") if DEVICE.type == "cuda" else ("resnet18",)
LOSS, GRADIENT = 1e-4, 1e-3  # relative differences up to which two ways count as the same

WAYS = {"exact": ("unet", WIDTH, 1.0), "decode_ratio=0.25": ("unet", WIDTH, 0.25), "light": ("light", LIGHT, 1.0)}


def ours(way: str, encoder: str, precision: torch.dtype = PRECISION) -> OurStep:
    """Return a step of ours, its windows in memory."""
    decoder, width, decode_ratio = WAYS[way]
    place = windows_on(DEVICE, BATCH, SIZE, FRAMES, Augmentation())
    model = build(decoder, width, DEVICE, encoder, FRAMES)
    return OurStep(model, place, BATCH, MaskSampler(ratio=MASKED), decode_ratio, precision)


def published(encoder: str) -> PublishedStep:
    """Return the published step on the same windows, with the same weights."""
    frames = next(ours("exact", encoder).frames)
    masks = MaskSampler(ratio=MASKED)
    model = Published(build("unet", WIDTH, DEVICE, encoder, FRAMES), encoder, masks(frames, step=0))
    return PublishedStep(model, frames, masks)


def check_equal(encoder: str) -> None:
    """Raise AssertionError unless both ways have one loss and one gradient, in float32."""
    theirs, exact = published(encoder), ours("exact", encoder, torch.float32)
    loss = theirs.model(theirs.frames, theirs.masks(theirs.frames, step=1))
    own = exact.loss()
    assert_close("loss", float(own.detach()), float(loss.detach()), LOSS)
    loss.backward()
    own.backward()
    assert_close("norm of the gradient", norm(exact.model), norm(theirs.model), GRADIENT)


def norm(model: nn.Module) -> float:
    return float(clip_gradients(model.parameters(), None))


def assert_close(what: str, actual: float, expected: float, tolerance: float) -> None:
    difference = abs(actual - expected) / abs(expected)
    if not difference <= tolerance:
        raise AssertionError(
            f"{what} {actual} differs from the published {expected} by {difference:.1e}; no time taken"
        )


def peak(step: Step) -> int:
    """Return the most bytes held at once during a step, above weights, moments and frames, which stay."""
    step()
    for parameter in step.model.parameters():  # type: ignore[attr-defined]
        parameter.grad = None
    if DEVICE.type == "cpu":
        return peak_bytes(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture(autouse=True)
def tf32():
    """Give the published way on a GPU the fast float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_step(benchmark, record, encoder):
    check_equal(encoder)
    steps: dict[str, Step] = {"published": published(encoder), **{way: ours(way, encoder) for way in WAYS}}
    for way, step in steps.items():
        assert math.isfinite(float(step())), way
    timing = in_turn(steps, rounds=5, warmup=1)
    case = f"{encoder} {SIZE}x{SIZE}x{FRAMES} {MASKED:.0%} masked batch {BATCH}"
    for way in WAYS:
        medians = (timing.median(way), timing.median("published"))
        record("step", case, way, "published", timing.ratio("published", way), medians, "s")
    benchmark.pedantic(steps["exact"], rounds=1)


@pytest.mark.parametrize("encoder", ENCODERS[:1])
def test_memory(benchmark, record, encoder):
    """Peak memory of a step, and how far the estimate of ``spatspark_fast.info`` is from it."""
    check_equal(encoder)
    rival = published(encoder)
    theirs = peak(rival)
    del rival
    case = f"{encoder} batch {BATCH}"
    for way, (_, _, decode_ratio) in WAYS.items():
        step = ours(way, encoder)
        own = peak(step)
        ratio = theirs / own
        record("step-memory", case, way, "published", Ratio(ratio, ratio, ratio), (own / 2**20, theirs / 2**20), "MiB")
        memory = estimate_memory(step.model, (SIZE, SIZE), MASKED, decode_ratio, PRECISION, (BATCH, 2 * BATCH))
        estimate = max(memory.step + BATCH * memory.window, memory.gradients + memory.scratch)
        error = estimate / own
        values = (own / 2**20, estimate / 2**20)
        record("step-memory", case, way, "estimate", Ratio(error, error, error), values, "MiB")
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="measured on a CPU; on a GPU the pipeline is part of the step")
def test_input_pipeline(benchmark, record):
    """Windows out of memory, cropped, flipped, turned and scaled, against the fastest step that consumes them."""
    step = ours("light", "resnet18")
    radar = SyntheticRadar(BATCH, FRAMES, 0, SIZE + 32)
    augmentation = Augmentation(crop=(SIZE, SIZE), flip=True, quarter_turns=True)
    place = OnHost(in_memory(radar, radar.scale), augmentation)
    keys = [(0, index) for index in range(BATCH)]

    def feed() -> Tensor:
        (frames,) = place.batches([keys])
        return frames

    assert feed().shape == (BATCH, FRAMES, SIZE, SIZE)
    timing = in_turn({"pipeline": feed, "light step": step}, rounds=7, warmup=2)
    medians = (timing.median("pipeline"), timing.median("light step"))
    record("input", f"batch {BATCH}", "pipeline", "light step", timing.ratio("light step", "pipeline"), medians, "s")
    benchmark.pedantic(feed, rounds=5)


def test_optimizer(benchmark, record):
    """LAMB on the parameters of ResNet-18 with the U-Net of width 768, against timm's."""
    theirs, own = published("resnet18"), ours("exact", "resnet18")
    for step in (theirs, own):
        step()
    timing = in_turn({"ours": own.optimizer.step, "timm": theirs.optimizer.step}, rounds=15, warmup=3)
    medians = (timing.median("ours"), timing.median("timm"))
    record("optimizer", "resnet18 unet 768", "ours", "timm", timing.ratio("timm", "ours"), medians, "s")
    benchmark.pedantic(own.optimizer.step, rounds=3)
