"""Pictures: colours mean what they say, masks cover what they should, and nothing global is touched."""

import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from spatspark_fast.common.plots import (
    DRY,
    EXTREME,
    HIDDEN,
    MISSING,
    RAIN_COLOURS,
    RAIN_LEVELS,
    draw_rain,
    rain_colours,
    reconstruction_figure,
    save_figure,
)


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def rgb(colour: str) -> list[int]:
    return [round(255 * part) for part in matplotlib.colors.to_rgb(colour)]


def test_each_class_of_rain_has_its_colour() -> None:
    colours, classes = rain_colours()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(RAIN_LEVELS)]
    drawn = [matplotlib.colors.to_hex(colours(classes(rate))) for rate in middles]
    assert drawn == list(RAIN_COLOURS)
    assert matplotlib.colors.to_hex(colours(classes(0.0))) == DRY
    assert matplotlib.colors.to_hex(colours(classes(300.0))) == EXTREME
    assert matplotlib.colors.to_hex(colours(np.ma.masked_invalid([np.nan])[0])) == MISSING


def test_hidden_patches_cover_the_rain_and_visible_ones_do_not() -> None:
    figure = Figure(figsize=(2, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_rain(axes, np.full((64, 64), 3.0), np.array([[True, False], [False, True]]))
    image = pixels(figure)
    rain = rgb(RAIN_COLOURS[3])
    assert image[50, 50].tolist() == rain
    assert image[150, 150].tolist() == rain
    assert image[50, 150].tolist() == rgb(HIDDEN)
    assert image[150, 50].tolist() == rgb(HIDDEN)


def test_the_panel_converts_to_mm_per_hour() -> None:
    frames = np.full((12, 64, 96), 2.0 / (47.83 * 12) * 1.01, dtype=np.float32)
    figure = reconstruction_figure(frames, np.ones((2, 3), bool), frames * 10, scale=47.83, title="epoch 1")
    axes = figure.axes[0]
    assert np.allclose(np.asarray(axes.images[0].get_array()), 2.02)
    assert np.allclose(np.asarray(figure.axes[2].images[0].get_array()), 20.2)
    labels = [figure.axes[3 * row].get_ylabel() for row in range(3)]
    assert labels == ["frame 1, -55 min", "frame 6, -30 min", "frame 12, now"]


@pytest.mark.parametrize("count", [1, 2])
def test_short_windows_draw_each_frame_once(count: int) -> None:
    frames = np.zeros((count, 32, 32), dtype=np.float32)
    figure = reconstruction_figure(frames, np.ones((1, 1), bool), frames, scale=1.0)
    assert len(figure.axes) == 3 * count + 1


def test_a_saved_figure_is_a_picture_with_content(tmp_path: Path) -> None:
    rain = np.random.default_rng(0).gamma(0.3, 3.0, size=(12, 64, 64)).astype(np.float32) / (47.83 * 12)
    active = np.eye(2, dtype=bool)
    path = tmp_path / "picture.png"
    save_figure(reconstruction_figure(rain, active, rain, scale=47.83), path)
    with Image.open(path) as image:
        assert image.size[0] > 600
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from spatspark_fast.common.plots import reconstruction_figure, save_figure\n"
        "x = np.zeros((2, 32, 32)); f = reconstruction_figure(x, np.ones((1, 1), bool), x, 1.0)\n"
        f"save_figure(f, Path({str(tmp_path / 'p.png')!r})); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
