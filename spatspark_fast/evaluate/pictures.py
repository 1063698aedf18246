"""Pictures of an evaluation: scores against lead time, power spectra, observed and forecast maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spatspark_fast.common.plots import draw_rain, finish_panel, map_panel, new_figure
from spatspark_fast.common.units import FRAME_MINUTES
from spatspark_fast.evaluate.scoring import Kept
from spatspark_fast.scores.spectrum import SMALL_SCALE

__all__ = ["lead_time_figure", "panel_figure", "spectra_figure"]

# Okabe and Ito's colours, distinct under colour blindness; black is kept for the observation.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#F0E442")
STYLES = ("-", "--", "-.", ":")

Scores = Mapping[str, Mapping[str, Any]]


def lead_time_figure(scores: Scores) -> Figure:
    """Draw errors, bias and sharpness, then CSI at each threshold and FSS at each scale, against lead time."""
    first = next(iter(scores.values()))
    thresholds, scales = first["thresholds_mm_per_hour"], first["fss_scales_pixels"]
    middle = min(thresholds, key=lambda threshold: abs(math.log(max(threshold, 1e-3))))  # the one nearest to 1 mm/h
    panels = {
        "pmse": "pMSE [(mm/5min)²]",
        "mean_error": "mean error [mm/h]",
        f"bias@{middle:g}": f"bias, {middle:g} mm/h",
    }
    panels["small_scale_power"] = f"small-scale power (< {SMALL_SCALE:g} px)"
    panels |= {f"csi@{threshold:g}": f"CSI, {threshold:g} mm/h" for threshold in thresholds}
    panels |= {f"fss@{middle:g}/{scale}": f"FSS, {middle:g} mm/h, {scale} pixels" for scale in scales if scale > 1}
    keys = [key for key in panels if key in first["by_lead_time"]]
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(3.2 * columns, 2.5 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, key in zip(grid, keys, strict=False):
        for number, (model, found) in enumerate(scores.items()):
            axes.plot(
                found["lead_minutes"],
                found["by_lead_time"][key],
                marker="o",
                markersize=2.5,
                **_line(number),
                label=model,
            )
        _finish(axes, panels[key], key)
    for axes in grid[len(keys) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _finish(axes: Axes, title: str, key: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("lead time [min]", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    name = key.split("@")[0]
    if name in ("csi", "fss", "pmse"):
        axes.set_ylim(bottom=0)
    if name in ("bias", "small_scale_power"):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
    if name == "mean_error":
        axes.axhline(0, color="black", linewidth=0.8)


def spectra_figure(scores: Scores) -> Figure | None:
    """Draw the power spectra of observation and forecasts at the first, a middle and the last lead time."""
    first = next(iter(scores.values()))
    if "spectrum" not in first:
        return None
    leads = first["lead_minutes"]
    chosen = sorted({0, (len(leads) - 1) // 2, len(leads) - 1})
    figure = new_figure(3.8 * len(chosen), 3.9)
    grid = figure.subplots(1, len(chosen), squeeze=False, sharey=True).ravel()
    wavelengths, observed = np.asarray(first["spectrum"]["wavelength_pixels"])[1:], first["spectrum"]["observed"]
    # By the observation alone: a forecast without any structure would squeeze the others.
    powers = [value for lead in chosen for value in observed[lead][1:] if value > 0] or [1.0]
    lowest, highest = min(powers) / 30, 10 * max(powers)
    for axes, lead in zip(grid, chosen, strict=True):
        axes.plot(wavelengths, _positive(observed[lead]), color="black", label="observed")
        for number, (model, found) in enumerate(scores.items()):
            axes.plot(wavelengths, _positive(found["spectrum"]["forecast"][lead]), **_line(number), label=model)
        axes.set_xscale("log")
        axes.set_ylim(lowest, highest)
        axes.set_yscale("log")
        axes.invert_xaxis()
        ticks = [length for length in (256, 128, 64, 32, 16, 8, 4, 2) if length <= wavelengths.max()]
        axes.set_xticks(ticks, [str(length) for length in ticks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_title(f"after {leads[lead]:g} min", fontsize=9)
        axes.set_xlabel("wavelength [pixels]", fontsize=8)
    grid[0].set_ylabel("power [(mm/h)²]", fontsize=8)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _positive(power: Sequence[float]) -> np.ndarray:
    """Leave out the mean, and what a logarithm cannot show."""
    values = np.asarray(power[1:], dtype=float)
    return np.where(values > 0, values, np.nan)


def panel_figure(kept: Kept, interval: float = FRAME_MINUTES, title: str = "") -> Figure:
    """Draw maps in mm/h: the newest observed frame, then observation and each forecast at some lead times."""
    count = len(kept.observed)
    chosen = sorted({0, *(round(count * part) - 1 for part in (0.25, 0.5, 0.75, 1.0) if round(count * part) >= 1)})
    rows = {"observed": kept.observed, **kept.forecasts}
    figure, grid = map_panel(len(rows), len(chosen) + 1, kept.now.shape)
    for number, (name, frames) in enumerate(rows.items()):
        if number == 0:
            draw_rain(grid[0, 0], kept.now.numpy())
        else:
            grid[number, 0].set_axis_off()
        for axes, lead in zip(grid[number, 1:], chosen, strict=True):
            draw_rain(axes, frames[lead].numpy())
            if number == 0:
                axes.set_title(f"+{interval * (lead + 1):g} min", fontsize=9)
        grid[number, 1].set_ylabel(_wrapped(name), fontsize=8)
    grid[0, 0].set_title("now", fontsize=9)
    finish_panel(figure, title)
    return figure


def _wrapped(name: str, width: int = 22) -> str:
    lines = [""]
    for word in name.split():
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _line(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
        "linewidth": 1.4,
    }
