"""Keep all windows of a data set uncompressed, two bytes a pixel where that changes nothing.

Radar depths come in whole hundredths of a millimetre, so 16 bits hold them. Where the values of a file do not
lie on that grid (rain made from reflectivities), they are kept in float32 as they are. A pixel without data is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.data.windows import WholeWindows

__all__ = [
    "HUNDREDTH",
    "MISSING",
    "Encoding",
    "OffGridError",
    "WindowStore",
    "decode",
    "encode",
    "encoding_of",
    "in_memory",
    "stored",
]

HUNDREDTH = 0.01  # mm per 5 min
LARGEST = np.iinfo(np.int16).max  # 327 mm in 5 min; the sign bit stays free, since GPU kernels know int16 only
MISSING = np.iinfo(np.uint16).max  # code of NaN; as int16 it is -1, and no other code is negative
ROUNDING = 2.0**-22  # of a value: two units in the last place of float32

Frames = NDArray[Any]


@dataclass(frozen=True)
class Encoding:
    """Say how pixels are stored: uint16 multiples of ``unit`` (data units), or float32 as they are (None).

    With ``gaps`` pixels may be NaN.
    """

    unit: float | None
    gaps: bool = False

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
    """Hold the windows ``codes`` ``(N, T, H, W)``, in memory or mapped from a file, and how they are encoded.

    ``checksum`` is one of all codes, where it is known.
    """

    codes: Frames
    encoding: Encoding
    checksum: int | None = None

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
    """Return data values as uint16 multiples of ``unit``, NaN as `MISSING`; None if that would change a value.

    Unchanged means: equal to two units in the last place of float32, which is what is lost when a file's
    writer divides by the scale in float32. Values must not be infinite or negative.
    """
    missing = np.isnan(window)
    values = np.where(missing, 0.0, window.astype(np.float64))
    codes = np.rint(values / unit)
    if codes.size and codes.max() > LARGEST:
        return None
    if (np.abs(codes * unit - values) > ROUNDING * values).any():
        return None
    return np.where(missing, MISSING, codes).astype(np.uint16)


def decode(codes: Frames, encoding: Encoding, out: Frames | None = None) -> Frames:
    """Return stored pixels as float32 data values, written into ``out`` if it is given."""
    if encoding.unit is None:
        return np.positive(codes, out=out, dtype=np.float32)
    frames = np.multiply(codes, np.float32(encoding.unit), out=out, dtype=np.float32, casting="unsafe")
    if encoding.gaps:
        np.copyto(frames, np.float32(np.nan), where=codes == MISSING)
    return frames


def encoding_of(windows: WholeWindows, probes: int = 3) -> Encoding:
    """Return the encoding that a few windows spread over the data set allow; `stored` checks each of them."""
    unit = HUNDREDTH / windows.scale
    places = np.linspace(0, len(windows) - 1, min(probes, len(windows))).round().astype(int)
    fits = all(encode(windows.untreated(int(place)), unit) is not None for place in places)
    return Encoding(unit if fits else None, windows.gaps)


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


def in_memory(windows: WholeWindows) -> WindowStore:
    """Read all windows of a data set into memory; raise what the data set raises for one that is bad."""
    encoding = encoding_of(windows)
    try:
        return _read(windows, encoding)
    except OffGridError:
        return _read(windows, Encoding(None, encoding.gaps))


def _read(windows: WholeWindows, encoding: Encoding) -> WindowStore:
    codes = np.empty((len(windows), *windows.untreated(0).shape), encoding.dtype)
    for index in range(len(windows)):
        codes[index] = stored(windows.untreated(index), encoding)
    return WindowStore(codes, encoding)
