"""Goals on a GPU beside what was measured there: a goal without rows is not met, it is open.

All are ratios of one run, bfloat16, 60 % masked, 288x288 pixels, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..measure.rows import LEFT_OUT, Row, read
from ..measure.scales import MASKED

__all__ = ["GOALS", "Goal", "goal_table"]

Rows = Sequence[Row]
STAGES = ("p8 C64-64", "p4 C128-128", "p2 C256-256", "p1 C512-512")
ENDS = (STAGES[0], STAGES[3])
OURS = ("triton", "triton tuned")
WHOLE_IMAGES = ("dense", "dense-and-mask", "gather")


@dataclass(frozen=True)
class Goal:
    """What should come out, and which rows answer it.

    Attributes:
        name: the goal, in words.
        least: the value it needs; None if it only wants to be known.
        values: yields ``(part of the goal, value, unit)`` for what the rows know; the goal is met if all reach it.
        parts: how many values a whole answer has.
    """

    name: str
    least: float | None
    values: Callable[[Rows], Iterator[tuple[str, float, str]]]
    parts: int = 1

    def line(self, rows: Rows) -> tuple[str, str, str]:
        """Return goal, measured, met."""
        found = list(self.values(rows))
        if not found:
            return self.name, "not measured", ""
        shown = ", ".join(f"{part} {value:.4g}{unit}".strip() for part, value, unit in found)
        if self.least is None:
            return self.name, shown, ""
        if len(found) < self.parts:
            return self.name, shown, f"{len(found)} of {self.parts} known"
        return self.name, shown, "yes" if all(value >= self.least for _, value, _ in found) else "no"


def _of(rows: Rows, suite: str, masked: float = MASKED, **wanted: str) -> list[Row]:
    share = f"{masked:g}"
    return [r for r in rows if r["suite"] == suite and r["masked"] in (share, "") and wanted.items() <= r.items()]


def _ratio(row: Row) -> float:
    return float(row["ratio"])


def _stages(masked: float) -> Callable[[Rows], Iterator[tuple[str, float, str]]]:
    """Return what yields all three passes of each 3x3 stage over dense, by the better of our configurations."""

    def values(rows: Rows) -> Iterator[tuple[str, float, str]]:
        for stage in STAGES:
            case = f"3x3 s1 {stage} g1 bfloat16 all"
            found = [r for r in _of(rows, "conv", masked, case=case, against="dense") if r["way"] in OURS]
            if found:
                yield stage.split("-")[0], max(map(_ratio, found)), "x"

    return values


def _peers(rows: Rows) -> Iterator[tuple[str, float, str]]:
    for stage in ENDS:
        case = f"3x3 s1 {stage} g1 bfloat16 step + map eager"
        found = [r for r in _of(rows, "conv", case=case) if r["against"].split(" ")[0] not in WHOLE_IMAGES]
        if found:
            best = min(found, key=_ratio)
            yield f"{stage.split('-')[0]} over {best['against']}", _ratio(best), "x"


def _encoders(rival: str) -> Callable[[Rows], Iterator[tuple[str, float, str]]]:
    """Return what yields captured encoders over the fastest way of a rival."""

    def values(rows: Rows) -> Iterator[tuple[str, float, str]]:
        for encoder in ("resnet18", "resnet50"):
            ours = [r for r in _of(rows, "encoder", way="auto graph") if r["case"].split(" ")[0] == encoder]
            found = [r for r in ours if r["against"].removesuffix(" graph").removesuffix(" compiled") == rival]
            if found:
                yield encoder, min(map(_ratio, found)), "x"

    return values


def _step(decoder: str) -> Callable[[Rows], Iterator[tuple[str, float, str]]]:
    """Return what yields a ResNet-18's step over the published one, by the best of its ways."""

    def values(rows: Rows) -> Iterator[tuple[str, float, str]]:
        ways = (decoder, f"{decoder} graph", f"{decoder} compiled")
        found = [r for r in _of(rows, "step", against="published") if r["way"] in ways]
        found = [r for r in found if r["case"].startswith("resnet18 288x288")]
        if found:
            best = max(found, key=_ratio)
            yield best["way"], _ratio(best), "x"

    return values


def _memory(rows: Rows) -> Iterator[tuple[str, float, str]]:
    for row in _of(rows, "step_memory"):
        if row["unit"] == "MiB" and row["against"] == "published" and row["case"].startswith("resnet18"):
            yield row["way"], float(row["value"]), " MiB"


def _images(rows: Rows) -> Iterator[tuple[str, float, str]]:
    found = {row["way"]: row for row in _of(rows, "images") if row["case"].startswith("resnet50 224x224x3")}
    for way, row in found.items():
        yield way, float(row["value"]), " images/s"


GOALS = (
    Goal("every 3x3 stage at least 2x dense cuDNN", 2, _stages(0.6), 4),
    Goal("3x3 at 30 % masked no slower than dense", 1, _stages(0.3), 4),
    Goal("at least 1.5x the best other library, its map included", 1.5, _peers, 2),
    Goal("captured encoder at least 2x the fastest dense", 2, _encoders("dense"), 2),
    Goal("captured encoder at least 3x dense-and-mask", 3, _encoders("dense-and-mask"), 2),
    Goal("step, exact decoder, at least 4x the published", 4, _step("exact")),
    Goal("step, sparse decoding, at least 8x the published", 8, _step("sparse")),
    Goal("step, light decoder, at least 20x the published", 20, _step("light")),
    Goal("peak memory of a step", None, _memory),
    Goal("ResNet-50 at 224x224 RGB (SparK reports 185 images/s per A100)", None, _images),
)


def goal_table(folder: Path) -> str:
    """Return goals beside the rows of a folder, and what was left out there."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path)] if folder.is_dir() else []
    lines = [f"| {goal} | {measured} | {met} |" for goal, measured, met in (goal.line(rows) for goal in GOALS)]
    table = "\n".join(["| goal | measured | met |", "|---|---|---|", *lines])
    missed = [f"- {row['way']}, {row['case']}: {row['reason']}" for row in rows if row["suite"] == LEFT_OUT]
    return "\n".join([table, *(["", "Left out:", "", *missed] if missed else [])])
