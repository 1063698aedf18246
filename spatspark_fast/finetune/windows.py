"""Hold the newest windows out of training, to choose the best checkpoint on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.data.windows import WholeWindows

__all__ = ["Split", "check_rain", "hold_out"]


@dataclass(frozen=True)
class Split:
    """Hold which windows train and which validate; ``dropped`` counts those that would be in both by time."""

    train: list[int]
    validation: list[int]
    dropped: int
    timed: bool


def hold_out(windows: NowcastDataset | SyntheticRadar, fraction: float) -> Split:
    """Hold out the newest ``fraction`` of the windows, and drop those that share frames with them.

    Where not every window has a time that can be read, their order in the file counts as order in time, and as
    many windows are dropped as a window has frames, at most a quarter. Raises UserError if nothing would be left
    to train on.
    """
    length = len(windows)
    if fraction == 0:
        return Split(list(range(length)), [], 0, True)
    held = max(1, round(fraction * length))
    spans = _spans(windows)
    if spans is None:
        frames = windows.input_length + windows.output_length
        dropped = min(frames - 1, length // 4)
        order, last = list(range(length)), length - held
        train = order[: max(last - dropped, 0)]
    else:
        order, last = sorted(range(length), key=lambda i: (spans[i], i)), length - held
        first_held = spans[order[last]][0] if held < length else spans[order[0]][0]
        train = [i for i in order[:last] if spans[i][1] < first_held]
    if not train:
        raise UserError(
            f"of {length} windows none is left to train on when {held} are held out for validation and those that "
            "share frames with them are dropped: give more data, or --data.validation_fraction 0"
        )
    return Split(sorted(train), sorted(order[last:]), length - held - len(train), spans is not None)


def check_rain(windows: WholeWindows, numbers: Sequence[int], what: str, above: float | None = None) -> None:
    """Raise UserError unless one of the windows with these ``numbers`` has data in the frames to come.

    With ``above`` it also has to rain more than that, in mm/h. ``what`` says what the windows do. Windows are read
    until one is found.
    """
    if above is None and not windows.gaps:
        return
    for number in numbers:
        frames = windows.untreated(number)[windows.past :]
        if np.isfinite(frames).any() if above is None else (units.mm_per_hour(frames, windows.scale) > above).any():
            return
    if above is None:
        raise UserError(
            f"none of the {len(numbers)} windows that {what} has a pixel with data in the frames to come, so there is "
            "nothing to learn from or to compare with: prepare the file with a larger --min_valid"
        )
    raise UserError(
        f"in none of the {len(numbers)} windows that {what} it rains more than {above:g} mm/h, so that CSI is the same "
        "for all: take --trainer.score mse, or more windows"
    )


def _spans(windows: NowcastDataset | SyntheticRadar) -> list[tuple[datetime, datetime]] | None:
    """Return the times of the first and the last frame of every window, or None where one has none."""
    frames = windows.input_length + windows.output_length
    spans = []
    for index in range(len(windows)):
        times = list(windows.times(index))[:frames]
        if not times or times[0] is None or times[-1] is None:
            return None
        spans.append((times[0], max(times[-1], times[0] + timedelta(minutes=units.FRAME_MINUTES * (frames - 1)))))
    return spans
