"""Cut a stream of frames into windows, holding no more than one window of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.radar.frames import Frame

__all__ = ["Cut", "Window", "WindowCutter", "WindowRules"]

WetRule = Literal["target-mean", "target-last", "frame-after"]


@dataclass(frozen=True)
class WindowRules:
    """Say which windows are kept.

    A window is kept if a wet share reaches ``wet_fraction``. ``wet_rule`` says which: that of all target frames on
    average (``target-mean``), of the last target frame (``target-last``), or of the frame that follows the window
    (``frame-after``, as the published NL-50 files were made). A pixel is wet above ``wet_threshold`` mm/h; no data
    counts as dry. ``stride`` counts frames between the starts of windows, from the start of a run without gaps.
    """

    input_length: int = 12
    output_length: int = 12
    stride: int = 1
    wet_fraction: float = 0.5
    wet_rule: WetRule = "target-mean"
    wet_threshold: float = units.MIN_WET_RATE
    min_valid: float = 0.5
    interval: timedelta = timedelta(minutes=units.FRAME_MINUTES)

    def __post_init__(self) -> None:
        for option in ("data.input_length", "data.output_length", "stride"):
            number = getattr(self, option.split(".")[-1])
            if number < 1:
                raise UserError(f"--{option} must be at least 1, got {number}")
        for option in ("wet_fraction", "min_valid"):
            if not 0 <= getattr(self, option) <= 1:
                raise UserError(f"--{option} is a share from 0 to 1, got {getattr(self, option)}")
        if self.wet_rule not in get_args(WetRule):
            raise UserError(f"--wet_rule {self.wet_rule!r} is none of {', '.join(get_args(WetRule))}")
        if not self.wet_threshold >= 0:
            raise UserError(f"--wet_threshold is a rain rate in mm/h from 0, got {self.wet_threshold}")
        if self.interval <= timedelta(0):
            raise UserError("--interval_minutes must be positive")

    @property
    def window(self) -> int:
        """Number of frames that a window holds."""
        return self.input_length + self.output_length

    @property
    def needed(self) -> int:
        """Number of frames in a row that a window needs: one more where the frame after it decides."""
        return self.window + (self.wet_rule == "frame-after")


@dataclass(frozen=True)
class Window:
    """Hold ``rain`` ``(T, H, W)`` float32 in mm per 5 min, ``valid`` ``(T, H, W)`` bool, and the T times."""

    split: str
    times: list[datetime]
    rain: NDArray[np.float32]
    valid: NDArray[np.bool_]


@dataclass
class Cut:
    """Count what happened: windows kept and dry for each split, breaks of the stream, frames without data."""

    kept: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0})
    dry: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0})
    gaps: int = 0
    missing_frames: int = 0
    longest_gap: timedelta = timedelta(0)
    empty_frames: list[datetime] = field(default_factory=list)
    largest_depth: float = 0.0


class WindowCutter:
    """Take frames in order of time and emit the windows that the rules keep.

    A gap in time ends the run of frames, and so does the time ``test_from`` at which the test split starts: no window
    reaches across, and no frame is in both splits. A frame with fewer valid pixels than ``min_valid`` is a gap.
    """

    def __init__(self, rules: WindowRules, test_from: datetime | None, emit: Callable[[Window], None]) -> None:
        self._rules = rules
        self._test_from = test_from
        self._emit = emit
        self._run: deque[tuple[Frame, float]] = deque(maxlen=rules.needed)
        self._length = 0  # frames of the run without gaps so far
        self._last: datetime | None = None
        self.cut = Cut()

    def push(self, frame: Frame) -> None:
        """Take the next frame."""
        if float(frame.valid.mean()) < self._rules.min_valid:
            self.cut.empty_frames.append(frame.time)
            return
        self._break_run(frame.time)
        depth = units.mm_per_hour_to_mm_per_5min(self._rules.wet_threshold)
        self._run.append((frame, float((frame.rain > depth).mean())))
        self._length += 1
        self._last = frame.time
        self.cut.largest_depth = max(self.cut.largest_depth, float(frame.rain.max()))
        start = self._length - self._rules.needed
        if start >= 0 and start % self._rules.stride == 0:
            self._consider()

    def _break_run(self, time: datetime) -> None:
        if self._last is None:
            return
        step, interval = time - self._last, self._rules.interval
        gap = step > 1.1 * interval
        if gap:
            self.cut.gaps += 1
            self.cut.missing_frames += round(step / interval) - 1
            self.cut.longest_gap = max(self.cut.longest_gap, step)
        if gap or self._split(time) != self._split(self._last):
            self._run.clear()
            self._length = 0

    def _split(self, time: datetime) -> str:
        return "test" if self._test_from is not None and time >= self._test_from else "train"

    def _consider(self) -> None:
        rules = self._rules
        entries = list(self._run)
        shares = [share for _, share in entries]
        if rules.wet_rule == "target-mean":
            wet = sum(shares[rules.input_length : rules.window]) / rules.output_length
        else:
            wet = shares[-1]  # of the last target frame, or of the frame after the window
        frames = [frame for frame, _ in entries[: rules.window]]
        split = self._split(frames[0].time)
        # A mean of shares that are equal to the limit may fall short of it by rounding.
        if wet < rules.wet_fraction - 1e-9:
            self.cut.dry[split] += 1
            return
        self.cut.kept[split] += 1
        self._emit(
            Window(
                split,
                [frame.time for frame in frames],
                np.stack([frame.rain for frame in frames]),
                np.stack([frame.valid for frame in frames]),
            )
        )
