"""Keep all windows of a data set uncompressed, two bytes a pixel where that changes nothing.

Radar depths come in whole hundredths of a millimetre, so 16 bits hold them. Where the values of a file do not
lie on that grid (rain made from reflectivities), they are kept in float32 as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HUNDREDTH",
    "Encoding",
    "OffGridError",
    "WindowStore",
    "decode",
    "encode",
    "encoding_of",
    "frames_of",
    "in_memory",
    "stored",
]

HUNDREDTH = 0.01  # mm per 5 min
LARGEST = np.iinfo(np.int16).max  # 327 mm in 5 min; the sign bit stays free, since GPU kernels know int16 only
ROUNDING = 2.0**-22  # of a value: two units in the last place of float32

Frames = NDArray[Any]


class _Windows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Encoding:
    """Say how pixels are stored: uint16 multiples of ``unit`` (data units), or float32 as they are (None)."""

    unit: float | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of a stored pixel, little-endian."""
        return np.dtype("<f4" if self.unit is None else "<u2")

    @property
    def name(self) -> str:
        """Return the encoding in words."""
        return "float32" if self.unit is None else "uint16 hundredths of a millimetre"


@dataclass(frozen=True)
class WindowStore:
    """Hold the windows ``codes`` ``(N, T, H, W)``, in memory or mapped from a file, and how they are encoded."""

    codes: Frames
    encoding: Encoding

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def frames(self) -> int:
        """Return the frames T of a window."""
        return self.codes.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.codes.shape[2], self.codes.shape[3]


def encode(window: Frames, unit: float) -> Frames | None:
    """Return data values as uint16 multiples of ``unit``; None if that would change them.

    Unchanged means: equal to two units in the last place of float32, which is what is lost when a file's
    writer divides by the scale in float32. Values must be finite and not negative.
    """
    codes = np.rint(window.astype(np.float64) / unit)
    if codes.size and codes.max() > LARGEST:
        return None
    if (np.abs(codes * unit - window) > ROUNDING * np.abs(window)).any():
        return None
    return codes.astype(np.uint16)


def decode(codes: Frames, encoding: Encoding, out: Frames | None = None) -> Frames:
    """Return stored pixels as float32 data values, written into ``out`` if it is given."""
    if encoding.unit is None:
        return np.positive(codes, out=out, dtype=np.float32)
    return np.multiply(codes, np.float32(encoding.unit), out=out, dtype=np.float32, casting="unsafe")


def encoding_of(windows: _Windows, scale: float, probes: int = 3) -> Encoding:
    """Return the encoding that a few windows spread over the data set allow; `stored` checks each of them."""
    unit = HUNDREDTH / scale
    places = np.linspace(0, len(windows) - 1, min(probes, len(windows))).round().astype(int)
    fits = all(encode(frames_of(windows[int(place)]), unit) is not None for place in places)
    return Encoding(unit if fits else None)


def frames_of(item: dict[str, Any]) -> Frames:
    """Return the input frames ``(T, H, W)`` float32 of an item of a data set."""
    return np.asarray(item["input"], dtype=np.float32)


def stored(window: Frames, encoding: Encoding) -> Frames:
    """Return the stored form of a window ``(T, H, W)`` float32.

    Raises:
        OffGridError: the window does not fit the encoding; take float32.
    """
    codes = window if encoding.unit is None else encode(window, encoding.unit)
    if codes is None:
        raise OffGridError("a window holds values that are no whole hundredths of a millimetre")
    return np.ascontiguousarray(codes, dtype=encoding.dtype)


class OffGridError(ValueError):
    """Tell that 16 bits would change a value."""


def in_memory(windows: _Windows, scale: float) -> WindowStore:
    """Read all windows of a data set into memory; raise what the data set raises for one that is bad."""
    encoding = encoding_of(windows, scale)
    try:
        return _read(windows, encoding)
    except OffGridError:
        return _read(windows, Encoding(None))


def _read(windows: _Windows, encoding: Encoding) -> WindowStore:
    codes = np.empty((len(windows), *frames_of(windows[0]).shape), encoding.dtype)
    for index in range(len(windows)):
        codes[index] = stored(frames_of(windows[index]), encoding)
    return WindowStore(codes, encoding)
