"""Pictures of the report, as small SVG files whose bytes depend on the rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..measure.rows import Row, words

__all__ = ["PLOTS", "draw_memory", "draw_speed", "draw_split"]

COLOURS = {"data": "#8da0cb", "encoder": "#1b9e77", "decoder": "#d95f02", "optimiser": "#7570b3"}
OURS, LIMIT, ROOF = "#1b9e77", "#444444", "#d95f02"
ORDER = ("published", "dense", "exact", "sparse", "light")
NAMES = {"dense": "best dense"}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9})
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=80)
    plt.close(figure)


def draw_speed(rows: Sequence[Row], path: Path) -> None:
    """Draw speed over plain dense against the masked share, with both limits."""
    sweep = [row for row in rows if row["suite"] == "mask_sweep"]
    cases = list(dict.fromkeys(row["case"] for row in sweep))
    figure, axes = _figure(3.6 * len(cases), 3.3, len(cases))
    for ax, case in zip(axes, cases, strict=True):
        found = sorted((row for row in sweep if row["case"] == case), key=lambda row: float(row["masked"]))
        shares = [100 * float(row["masked"]) for row in found]
        ratio, low, high = ([float(row[name]) for row in found] for name in ("ratio", "low", "high"))
        below = [r - v for r, v in zip(ratio, low, strict=True)]
        above = [v - r for r, v in zip(ratio, high, strict=True)]
        ax.plot(shares, [float(row["limit"]) for row in found], "--", color=LIMIT, label="active pairs")
        roof = [float(row["against_value"]) / float(row["floor"]) for row in found]
        ax.plot(shares, roof, ":", color=ROOF, label="roofline")
        ax.errorbar(shares, ratio, [below, above], fmt="o-", color=OURS, capsize=2, label="packed")
        ax.axhline(1, color="#bbbbbb", linewidth=0.8)
        ax.set(title=words(case), xlabel="masked share in %", yscale="log")
        ax.set_ylim(0.5, 1.3 * max(*ratio, *(float(row["limit"]) for row in found)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        ax.yaxis.set_minor_formatter(lambda value, _: "")
        ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32, 64) if t <= ax.get_ylim()[1]]
        ax.set_yticks(ticks)
    axes[0].set_ylabel("speed over plain dense")
    axes[0].legend(frameon=False, title="limits of direct convolution", loc="upper left")
    _save(figure, path)


def draw_split(rows: Sequence[Row], path: Path) -> None:
    """Draw how long the parts of a step take, way by way."""
    found = [row for row in rows if row["suite"] == "split"]
    cases = list(dict.fromkeys(row["case"].rsplit(" ", 1)[0] for row in found))
    figure, axes = _figure(4.6 * len(cases) + 0.8, 2.6, len(cases))
    for ax, case in zip(axes, cases, strict=True):
        values = {(row["way"], row["case"].rsplit(" ", 1)[1]): float(row["value"]) for row in found
                  if row["case"].rsplit(" ", 1)[0] == case}  # fmt: skip
        ways = [way for way in ORDER if (way, "encoder") in values]
        left = [0.0] * len(ways)
        for part, colour in COLOURS.items():
            widths = [values[way, part] for way in ways]
            ax.barh(
                [NAMES.get(way, way) for way in ways],
                widths,
                left=left,
                color=colour,
                label="densify, decoder" if part == "decoder" else part,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.invert_yaxis()
        ax.set(title=case, xlabel="seconds of a step, backward included")
    axes[-1].legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_memory(rows: Sequence[Row], path: Path) -> None:
    """Draw the peak memory of a step, way by way."""
    found = [row for row in rows if row["suite"] == "step_memory" and row["unit"] == "MiB"]
    cases = list(dict.fromkeys(row["case"] for row in found))
    figure, axes = _figure(4.2 * len(cases) + 0.8, 2.4, len(cases))
    for ax, case in zip(axes, cases, strict=True):
        peaks: dict[str, float] = {}
        for row in (row for row in found if row["case"] == case and row["against"] != "estimate"):
            peaks[row["way"]] = float(row["value"])
            peaks[row["against"]] = float(row["against_value"])
        ways = [way for way in ORDER if way in peaks]
        colours = [OURS if way in ORDER[2:] else "#999999" for way in ways]
        bars = ax.barh([NAMES.get(way, way) for way in ways], [peaks[way] for way in ways], color=colours)
        ax.bar_label(bars, fmt="%.0f", padding=3)
        ax.invert_yaxis()
        ax.set(title=case, xlabel="peak MiB above weights and moments")
        ax.margins(x=0.12)
    _save(figure, path)


# By name: the suite that a picture needs rows of, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[Sequence[Row], Path], None]]] = {
    "speed": ("mask_sweep", draw_speed),
    "split": ("split", draw_split),
    "memory": ("step_memory", draw_memory),
}
