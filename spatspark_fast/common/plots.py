"""Pictures of rain, drawn through matplotlib's object interface: no window, no global state."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from spatspark_fast.common.units import FRAME_MINUTES, mm_per_hour

__all__ = [
    "RAIN_COLOURS",
    "RAIN_LEVELS",
    "add_rain_scale",
    "draw_rain",
    "finish_panel",
    "map_panel",
    "new_figure",
    "rain_colours",
    "reconstruction_figure",
    "save_figure",
]

RAIN_LEVELS = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Bounds of the colour classes in mm/h; below the first a pixel is dry."""

RAIN_COLOURS = ("#cfe8f5", "#8fc7e8", "#4a9bd4", "#1f62ad", "#f7df4e", "#f5a42c", "#e0452f", "#a3177f")
"""One colour per class: blues for light, warm ones for heavy rain, distinct under colour blindness too."""

DRY, EXTREME, MISSING, HIDDEN = "#f4f4f1", "#4b0a45", "#b9b9b9", "#8d8d88"


def rain_colours() -> tuple[Colormap, BoundaryNorm]:
    """Return the colour map and its classes for rates in mm/h; dry is nearly white, missing (NaN) is grey."""
    colours = ListedColormap(RAIN_COLOURS, name="rain").with_extremes(under=DRY, over=EXTREME, bad=MISSING)
    return colours, BoundaryNorm(RAIN_LEVELS, len(RAIN_COLOURS))


def draw_rain(axes: Axes, rate: ArrayLike, active: ArrayLike | None = None) -> None:
    """Draw one frame ``(H, W)`` in mm/h; patches that are not ``active`` ``(Gh, Gw)`` bool are covered."""
    picture = np.asarray(rate, dtype=np.float32)
    height, width = picture.shape
    colours, classes = rain_colours()
    axes.imshow(picture, cmap=colours, norm=classes, interpolation="nearest", extent=(0, width, height, 0))
    if active is not None:
        visible = np.asarray(active, dtype=bool)
        cover = np.ma.masked_array(np.ones(visible.shape), mask=visible)
        flat = ListedColormap([HIDDEN])
        axes.imshow(cover, cmap=flat, interpolation="nearest", extent=(0, width, height, 0), vmin=0, vmax=1)
        for row in range(1, visible.shape[0]):
            axes.axhline(row * height / visible.shape[0], color="white", linewidth=0.3)
        for column in range(1, visible.shape[1]):
            axes.axvline(column * width / visible.shape[1], color="white", linewidth=0.3)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#777777")
        spine.set_linewidth(0.6)


def reconstruction_figure(
    frames: ArrayLike, active: ArrayLike, reconstruction: ArrayLike, scale: float, title: str = ""
) -> Figure:
    """Draw a window, what the encoder saw of it, and what the model made of that.

    The rows are the first, a middle and the last frame. ``frames`` and ``reconstruction`` are ``(T, H, W)`` in data
    units, ``scale`` mm per 5 min per unit; ``active`` is ``(Gh, Gw)`` bool, True where a patch was seen.
    """
    rates = mm_per_hour(np.asarray(frames, dtype=np.float32), scale)
    made = mm_per_hour(np.asarray(reconstruction, dtype=np.float32), scale)
    seen = np.asarray(active, dtype=bool)
    times = _some_frames(len(rates))
    figure, grid = map_panel(len(times), 3, rates.shape[1:], side=2.3, margins=(1.5, 0.9))
    for row, time in zip(grid, times, strict=True):
        draw_rain(row[0], rates[time])
        draw_rain(row[1], rates[time], seen)
        draw_rain(row[2], made[time])
        minutes = (time - len(rates) + 1) * FRAME_MINUTES
        row[0].set_ylabel(f"frame {time + 1}, {minutes:+.0f} min" if minutes else f"frame {time + 1}, now", fontsize=9)
    headings = ("input", f"visible to the encoder ({100 * seen.mean():.0f} %)", "reconstruction")
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10)
    finish_panel(figure, title)
    return figure


def _some_frames(count: int) -> Sequence[int]:
    return sorted({0, (count - 1) // 2, count - 1})


def new_figure(width: float, height: float, dpi: int = 130) -> Figure:
    """Make an empty figure of that size in inches."""
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def map_panel(
    rows: int,
    columns: int,
    shape: tuple[int, ...],
    side: float = 2.0,
    margins: tuple[float, float] = (1.3, 0.7),
) -> tuple[Figure, NDArray[np.object_]]:
    """Make a figure with axes ``(rows, columns)`` for maps of ``shape`` ``(H, W)`` pixels.

    A map is ``side`` inches wide; ``margins`` are inches in width and height for the colour scale and titles.
    """
    height, width = shape
    figure = new_figure(side * columns + margins[0], rows * side * height / width + margins[1])
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish_panel(figure: Figure, title: str = "") -> None:
    """Put the colour scale beside the maps of a panel, and a title above them."""
    add_rain_scale(figure, figure.axes)
    if title:
        figure.suptitle(title, fontsize=10)


def add_rain_scale(figure: Figure, axes: list[Axes]) -> None:
    """Put the colour scale of `draw_rain` beside the axes."""
    colours, classes = rain_colours()
    mappable = ScalarMappable(norm=classes, cmap=colours)
    bar = figure.colorbar(mappable, ax=axes, extend="both", shrink=0.85, pad=0.02, ticks=RAIN_LEVELS)
    bar.ax.set_yticklabels([f"{level:g}" for level in RAIN_LEVELS], fontsize=8)
    bar.set_label("rain rate [mm/h]", fontsize=9)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the name ends in."""
    figure.savefig(path, format="png")
