"""Models and files for the tests of evaluation and forecasts."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from spatspark_fast.data.radar.timestamps import format_timestamp
from spatspark_fast.models.forecaster import Forecaster
from spatspark_fast.models.registry import LoadedForecaster, build_forecaster, describe_forecaster

START = datetime(2020, 6, 1, 12, 0)
SMALL = {"encoder": "test_resnet", "decoder_width": 32, "unit": 1 / 47.83}


def moving_rain(windows: int, frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return ``(N, T, H, W)`` float32 mm/h: blobs that move one pixel to the right each frame, 0 to 20 mm/h."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    rain = np.zeros((windows, frames, height, width))
    for window in range(windows):
        for _ in range(6):
            y, x = rng.uniform(0, height), rng.uniform(-frames, width)
            peak, size = rng.uniform(2, 20), rng.uniform(3, 8)
            for t in range(frames):
                distance = (rows - y) ** 2 + (columns - x - t) ** 2
                rain[window, t] += peak * np.exp(-distance / (2 * size**2))
    return np.where(rain < 0.1, 0, rain).astype(np.float32)


def write_windows(
    path: Path, rates: np.ndarray, scale: float = 47.83, split: str = "test", missing: np.ndarray | None = None
) -> Path:
    """Write windows ``(N, T, H, W)`` in mm/h as an NL-50 file, one hour between the starts of two."""
    with h5py.File(path, "w") as file:
        file.attrs["scale_mm_per_5min"] = scale
        file.attrs["interval_minutes"] = 5.0
        group = file.create_group(split)
        group["images"] = (rates / 12 / scale).astype(np.float32)
        group["valid"] = np.ones(rates.shape, bool) if missing is None else ~missing
        stamps = [
            [[format_timestamp(START + timedelta(hours=n, minutes=5 * t)).encode()] for t in range(rates.shape[1])]
            for n in range(rates.shape[0])
        ]
        group["timestamps"] = np.array(stamps, dtype="S24")
    return path


def save_checkpoint(
    path: Path, kind: str = "spatspark", name: str = "test model", lengths: tuple[int, int] = (12, 12), **options: Any
) -> Path:
    """Write a checkpoint of a model with random weights, as `finetune` does."""
    torch.manual_seed(3)
    options = options or (dict(SMALL) if kind == "spatspark" else {})
    model = build_forecaster(kind, *lengths, options)
    with torch.no_grad():
        for parameter in model.parameters():  # some layers start at zero, and would hide what they do
            parameter += 0.05 * torch.randn_like(parameter)
    about = describe_forecaster(name, kind, *lengths, 47.83, options)
    torch.save({"forecaster": about, "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, path)
    return path


class Shift(Forecaster):
    """Move the newest frame ``dx`` pixels to the right for each step: what `moving_rain` does."""

    def __init__(self, in_length: int = 4, out_length: int = 3, multiple: int = 8, dx: int = 1) -> None:
        super().__init__(in_length, out_length, multiple)
        self.dx = dx

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        self.check(frames)
        column = torch.arange(frames.shape[-1], device=frames.device)
        # Rain that comes in over the edge is taken to be what is at the edge now.
        from_where = [(column - self.dx * (step + 1)).clamp(min=0) for step in range(self.out_length)]
        return torch.stack([frames[:, -1][..., where] for where in from_where], dim=1)


def loaded(model: Forecaster, name: str = "shift", scale: float = 47.83) -> LoadedForecaster:
    """Wrap a model as a checkpoint would give it."""
    return LoadedForecaster(model.eval(), name, model.in_length, model.out_length, scale, model.multiple)
