"""Make up radar rain: multi-scale cells that travel, grow and decay, from a seed."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.hdf5 import memory
from spatspark_fast.data.radar.timestamps import format_timestamp

__all__ = ["SyntheticRadar"]

_MARGIN = 96  # pixels by which the periodic field is larger than the image, so that rain does not return at once
_SYSTEM_SIZE = 300.0  # pixels
_STEP = 0.01  # mm per 5 min, KNMI's smallest
_MOST_WINDOWS = 1_000_000  # a thousand years of days
_COPIES = 4  # of a window in memory while it is made
_LARGEST_DEPTH = 12.0  # mm per 5 min; 144 mm/h


class _Weather(NamedTuple):
    """Describe one window: lengths in pixels (km), velocity in pixels per frame."""

    wet_fraction: float
    cell_size: float
    organised: float
    slope: float
    stretch: float
    angle: float
    velocity: tuple[float, float]
    growth: float
    intensity: float
    steepness: float


class SyntheticRadar(Dataset[dict[str, Any]]):
    """Serve made-up windows through the interface of ``NowcastDataset``.

    Window ``index`` follows from (``seed``, ``index``) alone. A Gaussian random field with a radar-like
    spectrum is advected; each of its scales is forgotten at its own pace, as in STEPS (Bowler et al., 2006),
    so that small cells live for minutes and large ones for hours. What exceeds a threshold, which moves as
    the rain area grows or decays, is rain. Constants are fitted to KNMI's data of 26 August 2010.

    Args:
        num_windows: length of the data set.
        input_length: frames of 5 min in ``"input"``, ``(T_in, H, W)`` float32.
        output_length: frames in ``"target"``, ``(T_out, H, W)`` float32.
        image_size: height and width in pixels of 1 km; one number for a square.
        seed: another seed, other weather.
        wet_fraction: smallest and largest wet share of a window.
    """

    def __init__(
        self,
        num_windows: int,
        input_length: int = 12,
        output_length: int = 12,
        image_size: int | tuple[int, int] = (288, 288),
        seed: int = 0,
        wet_fraction: tuple[float, float] = (0.35, 0.8),
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (height, width)
        if num_windows < 1 or input_length < 1 or output_length < 0 or min(self.image_size) < 1:
            raise UserError(
                f"synthetic radar needs at least one window, one input frame and one pixel, got "
                f"{num_windows} windows, {input_length} + {output_length} frames, {self.image_size} pixels"
            )
        if num_windows > _MOST_WINDOWS:
            raise UserError(f"synthetic radar has at most {_MOST_WINDOWS} windows, one a day, got {num_windows}")
        if _COPIES * 4 * (input_length + output_length) * height * width > memory():
            raise UserError(
                f"windows of {input_length} + {output_length} frames of {height} x {width} pixels do not fit into the "
                "memory of this machine; give smaller ones"
            )
        if not 0 < wet_fraction[0] <= wet_fraction[1] < 1:
            raise UserError(f"wet_fraction {wet_fraction} is not two shares between 0 and 1, the smaller first")
        self.num_windows = num_windows
        self.input_length = input_length
        self.output_length = output_length
        self.seed = seed
        self.wet_fraction = wet_fraction
        self.scale = units.NL50_SCALE
        self.attributes: dict[str, Any] = {"source": "synthetic", "scale_mm_per_5min": self.scale}

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._checked(index)
        frames = self._rain(index)
        return {
            "input": frames[: self.input_length],
            "target": frames[self.input_length :],
            "index": index,
        }

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the windows are the same in every epoch, as those of a file."""

    def timestamps(self, index: int) -> list[str]:
        """Return the times of all frames of a window; each window has a day of its own."""
        return [format_timestamp(time) for time in self.times(index)]

    def times(self, index: int) -> list[datetime]:
        """Return the times of all frames of a window, naive UTC."""
        start = datetime(2000, 1, 1) + timedelta(days=self._checked(index))
        step = timedelta(minutes=units.FRAME_MINUTES)
        return [start + (i + 1) * step for i in range(self.input_length + self.output_length)]

    def _checked(self, index: int) -> int:
        if not -self.num_windows <= index < self.num_windows:
            raise IndexError(f"window {index} of {self.num_windows}")
        return int(index) % self.num_windows

    def _rain(self, index: int) -> Tensor:
        """Return a window, ``(T, H, W)`` float32, normalised, in KNMI's steps of 0.01 mm per 5 min."""
        rng = np.random.default_rng((self.seed, index))
        weather = _draw_weather(rng, self.wet_fraction)
        noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
        field = _travelling_field(weather, self.input_length + self.output_length, self.image_size, noise)
        drift = torch.linspace(-0.5, 0.5, len(field))[:, None, None] * weather.growth
        # Of a part of the pixels: for a quantile all of them would have to be sorted.
        sample = field[:, ::5, ::5]
        mean, spread = sample.mean(), sample.std(correction=0).clamp_min(1e-6)
        threshold = torch.quantile((sample - mean) / spread + drift, 1.0 - weather.wet_fraction)
        # In few passes over the array, since these cost as much as the Fourier transform.
        field.mul_(weather.steepness / spread).add_(weather.steepness * (drift - threshold - mean / spread))
        steps = field.clamp_(min=0.0).expm1_()
        steps.mul_(units.mm_per_hour_to_mm_per_5min(weather.intensity) / _STEP).round_()
        return steps.clamp_(max=_LARGEST_DEPTH / _STEP).mul_(_STEP / self.scale)


def _draw_weather(rng: np.random.Generator, wet_fraction: tuple[float, float]) -> _Weather:
    """Draw the weather of a window: a third of them showers, the others widespread rain."""
    showers = rng.random() < 1 / 3
    heading, speed = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 6.0)  # 12 to 72 km/h
    smallest, largest = (30.0, 80.0) if showers else (80.0, 250.0)
    return _Weather(
        wet_fraction=rng.uniform(*wet_fraction),
        cell_size=math.exp(rng.uniform(math.log(smallest), math.log(largest))),
        organised=rng.uniform(0.3, 1.5),
        slope=rng.uniform(3.3, 3.9),
        stretch=math.exp(rng.uniform(0.0, math.log(2.5))),
        angle=heading + rng.normal(0.0, 0.4),
        velocity=(speed * math.sin(heading), speed * math.cos(heading)),
        growth=rng.normal(0.0, 0.4),
        intensity=math.exp(rng.normal(math.log(0.75 if showers else 0.5), 0.35)),
        steepness=rng.uniform(0.9, 1.1) if showers else rng.uniform(0.75, 0.95),
    )


def _travelling_field(weather: _Weather, frames: int, size: tuple[int, int], noise: torch.Generator) -> Tensor:
    """Return a Gaussian random field ``(frames, H, W)`` float32 that travels and forgets."""
    rows, columns = (_fast_length(length + _MARGIN) for length in size)
    # Waves shorter than 3 pixels would be noise that costs half of the time.
    band = rows // 3
    ky = torch.fft.fftfreq(rows)  # cycles per pixel
    ky = torch.cat([ky[: band + 1], ky[-band:]])[:, None]
    kx = torch.fft.rfftfreq(columns)[None, : columns // 3 + 1]
    amplitude, memory = _amplitude_and_memory(weather, ky, kx)
    # The last axis is the real and the imaginary part: products of reals alone are faster.
    parts = torch.randn(frames, *amplitude.shape, 2, generator=noise)
    parts[0] *= amplitude[..., None]
    parts[1:] *= (amplitude * (1.0 - memory.square()).sqrt())[..., None]
    for now in range(1, frames):
        parts[now].addcmul_(parts[now - 1], memory[..., None])
    # The waves stand still so far; a phase that grows with time carries them along.
    time = torch.arange(frames, dtype=torch.float32)[:, None, None]
    down, right = (torch.exp(-2j * math.pi * v * time * k) for v, k in zip(weather.velocity, (ky, kx), strict=True))
    spectrum = torch.view_as_complex(parts).mul_(down)
    whole = spectrum.new_zeros(frames, rows, spectrum.shape[2])
    whole[:, : band + 1], whole[:, -band:] = spectrum[:, : band + 1], spectrum[:, band + 1 :]
    lines = torch.fft.ifft(whole, dim=1, norm="forward")[:, : size[0]].mul_(right)
    return torch.fft.irfft(lines, n=columns, dim=2, norm="forward")[..., : size[1]].contiguous()


def _amplitude_and_memory(weather: _Weather, ky: Tensor, kx: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each wave its amplitude, and its correlation from one frame to the next."""
    cosine, sine = math.cos(weather.angle), math.sin(weather.angle)
    along, across = kx * cosine + ky * sine, ky * cosine - kx * sine
    wavenumber = torch.hypot(along * math.sqrt(weather.stretch), across / math.sqrt(weather.stretch))
    power = torch.zeros_like(wavenumber)
    # Cells, and the large systems that they belong to.
    for share, length in ((1.0, weather.cell_size), (weather.organised, _SYSTEM_SIZE)):
        part = (wavenumber.square() + (1.0 / length) ** 2).pow(-weather.slope / 2)
        power += share * part / part.sum()
    power[0, 0] = 0.0
    # A wave of 10 km is forgotten in some 5 frames, one of 100 km in some 40.
    memory = torch.exp(-1.0 / (0.6 * wavenumber.clamp_min(1e-3).pow(-0.9)))
    return power.sqrt(), memory


def _fast_length(length: int) -> int:
    """Return the next even length whose Fourier transform is fast: factors 2, 3 and 5 only."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1 and length % 2 == 0:
            return length
        length += 1
