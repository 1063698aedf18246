"""The input pipeline against the fastest step that consumes it: windows out of memory, cropped, flipped, turned."""

from __future__ import annotations

from torch import Tensor

from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.resident.places import OnDevice, OnHost, Place, SentAhead

from .measure.timing import check_parity, in_turn
from .subjects.step_ways import check_equal, make_step
from .subjects.steps import windows

SPARE = 32  # pixels that a crop may lie in
STEP = "light step"


def places(scale) -> dict[str, Place]:
    """Return the same windows under the same augmentation in the places that they can be taken from.

    On a CPU, `OnDevice` is not timed. It runs other code, so its frames are compared with those of `OnHost`.
    """
    store = windows(scale.batch, scale.frames, scale.size + SPARE)
    augmentation = Augmentation(crop=(scale.size, scale.size), flip=True, quarter_turns=True)
    return {
        "memory of the host": OnHost(store, augmentation),
        "memory of the device": OnDevice(store, augmentation, scale.device),
        **({"sent ahead": SentAhead(store, augmentation, scale.device)} if scale.cuda else {}),
    }


def test_input_pipeline(benchmark, record, scale):
    """Images/s of the pipeline over those of the light step; every place must give the same frames."""
    encoder = scale.step_encoders[0]
    assert not check_equal(encoder, scale)
    keys = [(0, index) for index in range(scale.batch)]

    def feed(place: Place) -> Tensor:
        (frames,) = place.batches([keys])
        return frames

    ways = {name: lambda place=place: feed(place) for name, place in places(scale).items()}
    host = ways["memory of the host"]()
    for name, run in ways.items():
        check_parity(f"frames from {name}", run().cpu(), host.cpu(), 1e-6)
    if not scale.cuda:
        del ways["memory of the device"]
    timing = in_turn({**ways, STEP: make_step("light", encoder, scale)}, 2 * scale.step_rounds + 1, warmup=1)
    for name in ways:
        ratio, seconds, _ = timing.compare(name, STEP)
        rates = (scale.batch / seconds[0], scale.batch / seconds[1])
        case = f"{name}, batch {scale.batch}, crop, flip and turn"
        record("data", case, "pipeline", STEP, ratio, rates, "images/s")
    benchmark.pedantic(ways["memory of the host"], rounds=1)
