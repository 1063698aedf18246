"""Frames, steps and options that nobody should have to expect, for `spatspark_fast.nowcast`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from spatspark_fast import nowcast
from spatspark_fast.models.forecaster import Persistence
from spatspark_fast.models.registry import load_forecaster

from ..forecast.forecasts import loaded, save_checkpoint
from .damage import NUMBERS, VALUES
from .outcomes import Suite, Verdict, judge_call, wrong

LENGTH = 3


def prepare(folder: Path) -> None:
    """Write a small forecaster."""
    save_checkpoint(folder / "small.ckpt", lengths=(LENGTH, 2))


def attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    """Draw frames, steps and options, and forecast; persistence shows whether the numbers are right."""
    frames, odd_frames = _frames(random)
    steps = _steps(random)
    options: dict[str, Any] = {}
    if random.random() < 0.3:
        options["tile"] = random.choice((None, 8, 16, 32, 64, 0, -8, 12, 10**9, 2.5, "x", True))
    if random.random() < 0.1:
        options["device"] = random.choice(("cpu", "", "gpu", "cuda:99", "meta", "cpu:7", None, 3))
    if random.random() < 0.3:
        path = folder / "small.ckpt"
        model: Any = random.choice((path, str(path), load_forecaster(path), folder, "", "no.ckpt", None, 3))
        return _judged(partial(_small, frames, steps, model, options))
    if not odd_frames and random.random() < 0.4:
        return _judged(partial(_persistent, frames, random.choice((1, 2, 3, 7, [1, 2], [0.5, 1.5, 4])), {}, frames))
    return _judged(partial(_persistent, frames, steps, options, None if odd_frames else frames))


def _judged(function: Any) -> Verdict:
    """Judge a call; Python's own TypeError and AttributeError refuse what breaks the annotation of an argument."""
    verdict = judge_call(function)
    python = verdict.what.startswith(("TypeError", "AttributeError"))
    return Verdict("refused") if verdict.outcome == "traceback" and python else verdict


def _persistent(frames: Any, steps: Any, options: dict[str, Any], known: np.ndarray | None) -> Verdict | None:
    made = nowcast(frames, steps, loaded(Persistence(LENGTH, 2)), **options)
    verdict = _checked(made)
    if verdict or known is None or not isinstance(steps, int | list):
        return verdict
    newest = np.asarray(known[-1])
    count = steps if isinstance(steps, int) else len(steps)
    if made.shape != (count, *newest.shape):
        return wrong("nowcast: another shape")
    # Where the newest frame has no data, persistence says dry, or nothing where there never was any.
    seen = np.isfinite(newest)
    if not np.allclose(made[:, seen], np.broadcast_to(newest, made.shape)[:, seen], rtol=1e-3, atol=1e-3):
        return wrong("nowcast: persistence does not persist")
    return None


def _small(frames: Any, steps: Any, model: Any, options: dict[str, Any]) -> Verdict | None:
    return _checked(nowcast(frames, steps, model, **options))


def _checked(made: Any) -> Verdict | None:
    if not isinstance(made, np.ndarray) or np.isinf(made).any() or (made < 0).any():
        return wrong("nowcast: values that are no rain")
    return None


def _frames(random: Random) -> tuple[Any, bool]:
    """Return frames, and whether they are odd."""
    generator = np.random.default_rng(random.randrange(2**32))
    sides = (random.choice((LENGTH, LENGTH + 2)), random.choice((1, 7, 33, 64)), random.choice((1, 8, 32, 50)))
    frames = generator.gamma(0.4, 3.0, sides).astype(random.choice(("f4", "f8", "f4", ">f4", "f2")))
    match random.randrange(14):
        case 0:
            frames[generator.random(sides) < 0.3] = np.nan
        case 1:
            frames[:] = np.nan
        case 2:
            return np.ma.masked_less(frames, 1.0), True
        case 3:
            frames[tuple(random.randrange(side) for side in sides)] = random.choice((np.inf, -1, -np.inf, 1e30, -0.0))
            return frames, True
        case 4:
            return frames.astype(random.choice(("i4", "?", "c8", "O", "S3", "u1", "M8[s]"))), True
        case 5:
            return frames[tuple(slice(random.choice((0, 1, side))) for side in sides)], True
        case 6:
            return random.choice((frames[0], frames[None], frames.tolist(), frames[:, ::2, ::-1])), True
        case 7:
            return random.choice(VALUES), True
        case 8:
            return np.broadcast_to(
                np.float32(1), random.choice(((3, 1, 2**40), (2**40, 1, 1), (3, 2**20, 2**20)))
            ), True
    return frames, False


def _steps(random: Random) -> Any:
    number = random.choice((1, 2, 5, 0.5, *NUMBERS))
    kinds = [number, [number], [0.5, number], (1, 2, number), np.float64(2), np.array([1.0, 2.0]), [1, 1], [2, 1], "3"]
    steps = random.choice([*kinds, [], None, [[1, 2]], {1: 2}, range(1, 4), np.int8(3), [True], [None], ["x"]])
    return steps


SUITE = Suite(prepare, attempt)
