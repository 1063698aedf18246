"""Windows are cut where the rules say, and the split wastes and shares nothing."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.radar.archive import Entry, choose_split, put_in_order
from spatspark_fast.data.radar.frames import Frame
from spatspark_fast.prepare.cutter import Window, WindowCutter, WindowRules
from tests.prepare.archives import START

STEP = timedelta(minutes=5)


def frame(step: float, wet: float = 1.0, valid: float = 1.0) -> Frame:
    """Make a frame of 10 x 10 pixels, a share of them with 1.2 mm/h."""
    rain = np.zeros(100, np.float32)
    rain[: round(100 * wet)] = 0.1
    known = np.arange(100) < round(100 * valid)
    return Frame(START + step * STEP, rain.reshape(10, 10), known.reshape(10, 10), (10, 10))


def run(
    rules: WindowRules, frames: list[Frame], test_from: datetime | None = None
) -> tuple[list[Window], WindowCutter]:
    windows: list[Window] = []
    cutter = WindowCutter(rules, test_from, windows.append)
    for one in frames:
        cutter.push(one)
    return windows, cutter


def starts(windows: list[Window]) -> list[float]:
    return [(window.times[0] - START) / STEP for window in windows]


def test_gaps_end_a_window() -> None:
    steps = [0, 1, 2, 3, 5, 6, 7, 8, 9, 20]
    windows, cutter = run(WindowRules(2, 1), [frame(step) for step in steps])
    assert starts(windows) == [0, 1, 5, 6, 7]
    assert (cutter.cut.gaps, cutter.cut.missing_frames) == (2, 11)
    assert cutter.cut.longest_gap == 11 * STEP
    for window in windows:
        assert [b - a for a, b in zip(window.times, window.times[1:], strict=False)] == [STEP, STEP]


def test_stride_counts_from_the_start_of_a_run() -> None:
    windows, _ = run(WindowRules(2, 1, stride=3), [frame(step) for step in (*range(8), *range(9, 16))])
    assert starts(windows) == [0, 3, 9, 12]


@pytest.mark.parametrize(
    ("rule", "expected"),
    # wet shares   0    1    2    3    4    5    6    7
    # of frames   1.0  1.0  0.6  0.3  0.7  0.2  0.9  1.0;  windows of 2 + 2
    [
        ("target-mean", [1, 3, 4]),  # means .45 .50 .45 .55 .95
        ("target-last", [1, 3, 4]),  # last  .3  .7  .2  .9  1.0
        ("frame-after", [0, 2, 3]),  # after .7  .2  .9  1.0 (none)
    ],
)
def test_wet_rules(rule, expected: list[float]) -> None:
    wet = [1.0, 1.0, 0.6, 0.3, 0.7, 0.2, 0.9, 1.0]
    windows, cutter = run(WindowRules(2, 2, wet_rule=rule), [frame(step, share) for step, share in enumerate(wet)])
    assert starts(windows) == expected
    assert all(len(window.times) == 4 for window in windows)
    possible = 4 if rule == "frame-after" else 5
    assert cutter.cut.dry["train"] == possible - len(expected)


def test_frame_after_must_follow_without_a_gap() -> None:
    windows, _ = run(WindowRules(1, 1, wet_rule="frame-after"), [frame(step) for step in (0, 1, 3, 4, 5)])
    assert starts(windows) == [3]


def test_wet_threshold_is_a_rate() -> None:
    assert len(run(WindowRules(1, 1, wet_threshold=1.19), [frame(0), frame(1)])[0]) == 1
    assert len(run(WindowRules(1, 1, wet_threshold=1.21), [frame(0), frame(1)])[0]) == 0


def test_frames_without_enough_data_are_gaps() -> None:
    frames = [frame(0), frame(1, valid=0.4), frame(2), frame(3), frame(4, valid=0.6)]
    windows, cutter = run(WindowRules(1, 1), frames)
    assert starts(windows) == [2, 3]
    assert cutter.cut.empty_frames == [START + STEP]
    assert windows[1].valid[1].mean() == pytest.approx(0.6)


def test_no_frame_is_in_both_splits() -> None:
    windows, cutter = run(WindowRules(2, 1), [frame(step) for step in range(10)], START + 5 * STEP)
    by_split = {
        split: {time for window in windows if window.split == split for time in window.times}
        for split in ("train", "test")
    }
    assert starts(windows) == [0, 1, 2, 5, 6, 7]
    assert not by_split["train"] & by_split["test"]
    assert cutter.cut.kept == {"train": 3, "test": 3}
    assert cutter.cut.gaps == 0


def _complete(steps: list[int], window: int) -> Iterator[int]:
    """Yield the last step of every gapless window: the definition, slowly."""
    known = set(steps)
    for step in steps:
        if all(step - back in known for back in range(window)):
            yield step


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=60, unique=True).map(sorted),
    st.integers(1, 6),
    st.floats(0.05, 0.95),
)
def test_split_is_the_best_there_is(steps: list[int], window: int, fraction: float) -> None:
    times = [START + step * STEP for step in steps]

    def counts(split: int) -> tuple[int, int]:
        ends = list(_complete(steps, window))
        return sum(end < split for end in ends), sum(end - window + 1 >= split for end in ends)

    def error(split: int) -> float:
        train, test = counts(split)
        return abs(test - fraction * (train + test))

    usable = [step for step in steps if min(counts(step)) > 0]
    chosen = choose_split(times, STEP, window, fraction)
    if not usable:
        assert chosen is None
    else:
        assert chosen is not None
        best = min(error(step) for step in usable)
        assert error(round((chosen - START) / STEP)) == pytest.approx(best, abs=1e-3)


def test_split_at_the_ends() -> None:
    times = [START + step * STEP for step in range(10)]
    assert choose_split(times, STEP, 3, 0.0) is None
    assert choose_split(times, STEP, 3, 1.0) == times[0]
    assert choose_split(times, STEP, 6, 0.2) is None  # 10 frames hold no two windows of 6


def test_order_duplicates_and_frames_in_between() -> None:
    entries = [Entry(START + minutes * timedelta(minutes=1), name) for minutes, name in
               ((10, "c"), (0, "a"), (5, "b2"), (5, "b1"), (7, "d"), (15, "e"))]  # fmt: skip
    kept, skipped = put_in_order(entries, STEP)
    assert [entry.path for entry in kept] == ["a", "b1", "c", "e"]
    assert {item.path: item.reason for item in skipped} == {
        "b2": "same time as b1",
        "d": "within --interval_minutes of the frame before",
    }
    half, _ = put_in_order([Entry(START + step * STEP, str(step)) for step in range(5)], 2 * STEP)
    assert [entry.path for entry in half] == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"input_length": 0}, "--data.input_length"),
        ({"stride": 0}, "--stride"),
        ({"wet_fraction": 1.5}, "--wet_fraction"),
        ({"min_valid": -0.1}, "--min_valid"),
        ({"wet_rule": "sometimes"}, "--wet_rule"),
        ({"wet_threshold": float("nan")}, "--wet_threshold"),
        ({"interval": timedelta(0)}, "--interval_minutes"),
    ],
)
def test_wrong_rules_are_named(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        WindowRules(**options)
