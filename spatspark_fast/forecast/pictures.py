"""Pictures of a forecast: a panel of maps, and an animation from the past into the future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from spatspark_fast.common.files import atomic_path
from spatspark_fast.common.plots import add_rain_scale, draw_rain, finish_panel, map_panel, new_figure
from spatspark_fast.forecast.result import Forecast
from spatspark_fast.forecast.starts import Start

__all__ = ["forecast_figure", "write_animation"]

_PAST, _FUTURE = "#333333", "#b3261e"
_FRAME_MS, _LAST_MS = 220, 1500


def forecast_figure(forecast: Forecast) -> Figure:
    """Draw six observed frames above six lead times, in mm/h."""
    start, count = forecast.start, len(forecast.rates)
    past = _spread(len(start.rates), 6)
    future = _spread(count, 6)
    columns = max(len(past), len(future))
    figure, grid = map_panel(2, columns, start.rates.shape[1:], margins=(1.3, 1.1))
    for axes in grid.ravel():
        axes.set_axis_off()
    for axes, index in zip(grid[0, columns - len(past) :], past, strict=True):
        axes.set_axis_on()
        draw_rain(axes, start.rates[index])
        axes.set_title(_past_title(start, index), fontsize=8, color=_PAST)
    for axes, index in zip(grid[1], future, strict=False):
        axes.set_axis_on()
        draw_rain(axes, forecast.rates[index])
        axes.set_title(_future_title(forecast, index), fontsize=8, color=_FUTURE)
    grid[0, columns - len(past)].set_ylabel("observed", fontsize=9)
    grid[1, 0].set_ylabel("forecast", fontsize=9)
    day = f", {start.times[-1]:%Y-%m-%d %H:%M} UTC" if start.times else ""
    finish_panel(figure, f"{forecast.model}{day}, {start.origin}")
    return figure


def write_animation(forecast: Forecast, path: Path) -> None:
    """Write a GIF: the observed frames that the model read, then the forecast, which has a red title."""
    start = forecast.start
    drawn = [_draw(start.rates[i], _past_title(start, i), _PAST) for i in range(len(start.rates))]
    drawn += [_draw(rates, _future_title(forecast, i), _FUTURE) for i, rates in enumerate(forecast.rates)]
    # One palette for all, taken from frames that show both titles and the whole colour scale.
    palette = Image.fromarray(np.concatenate((drawn[0], drawn[-1]))).quantize(64)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
    durations = [_FRAME_MS] * (len(images) - 1) + [_LAST_MS]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False
        )


def _draw(rates: np.ndarray, title: str, colour: str) -> np.ndarray:
    height, width = rates.shape
    figure = new_figure(5.2, 4.3 * height / width + 0.4, dpi=100)
    axes = figure.subplots()
    draw_rain(axes, rates)
    axes.set_title(title, fontsize=10, color=colour)
    add_rain_scale(figure, [axes])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _past_title(start: Start, index: int) -> str:
    if start.times is not None:
        return f"observed {start.times[index]:%H:%M} UTC"
    minutes = (index - len(start.rates) + 1) * start.interval.total_seconds() / 60
    return f"observed {minutes:+g} min" if minutes else "observed, now"


def _future_title(forecast: Forecast, index: int) -> str:
    lead = f"+{forecast.lead_minutes[index]:g} min"
    times = forecast.valid_times
    return f"forecast {lead}" if times is None else f"forecast {lead}, {times[index]:%H:%M} UTC"
