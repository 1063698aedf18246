"""Say what one radar image is, wherever it came from: a depth of rain, where it is valid, when and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from spatspark_fast.common.errors import UserError

__all__ = ["Crop", "Frame", "FrameError", "Georeference", "Source", "centre_crop", "cut", "parse_crop"]

Image = TypeVar("Image", bound=NDArray[Any])


class FrameError(UserError):
    """Report why one file is no usable radar image; ``prepare`` skips such a file and lists it."""


class Crop(NamedTuple):
    """Keep rows ``top:bottom`` and columns ``left:right`` of an image."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what is kept, in pixels."""
        return self.bottom - self.top, self.right - self.left

    def check(self, shape: tuple[int, int]) -> None:
        """Raise UserError unless the crop lies inside an image of that shape."""
        if self.bottom > shape[0] or self.right > shape[1]:
            raise UserError(
                f"crop {self} reaches outside the image of {shape[0]} rows and {shape[1]} columns; "
                f"give --crop r0:r1,c0:c1 inside it"
            )

    def __str__(self) -> str:
        return f"{self.top}:{self.bottom},{self.left}:{self.right}"


def parse_crop(text: str) -> Crop:
    """Read ``r0:r1,c0:c1``, the rows and columns to keep.

    Raises:
        UserError: the text is not of that form, or keeps nothing.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*,\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise UserError(f"--crop {text!r} is not of the form r0:r1,c0:c1, e.g. 282:570,225:513")
    crop = Crop(*(int(number) for number in match.groups()))
    if crop.bottom <= crop.top or crop.right <= crop.left:
        raise UserError(f"--crop {text!r} keeps no pixel; rows and columns must increase, as in 282:570,225:513")
    return crop


def centre_crop(shape: tuple[int, int], size: int = 288) -> Crop:
    """Keep the ``size`` x ``size`` pixels at the centre, or all rows (columns) where there are fewer."""
    height, width = min(size, shape[0]), min(size, shape[1])
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return Crop(top, top + height, left, left + width)


@dataclass(frozen=True)
class Frame:
    """Hold one radar image.

    ``rain``: ``(H, W)`` float32, mm per 5 min, 0 where invalid. ``valid``: ``(H, W)`` bool, False = no data.
    ``time``: end of the interval, naive UTC. ``image_shape``: rows and columns of the image before cropping.
    """

    time: datetime
    rain: NDArray[np.float32]
    valid: NDArray[np.bool_]
    image_shape: tuple[int, int]

    @classmethod
    def from_depth(
        cls, time: datetime, depth: NDArray, valid: NDArray[np.bool_], image_shape: tuple[int, ...]
    ) -> Frame:
        """Make a frame of a depth in mm per 5 min; what is not finite is invalid, what is negative is dry."""
        valid = valid & np.isfinite(depth)
        rain = np.where(valid, np.maximum(depth, 0.0), 0.0).astype(np.float32)
        return cls(time, rain, valid, (image_shape[0], image_shape[1]))


def cut(image: Image, crop: Crop | None) -> Image:
    """Return the pixels of ``crop``, a view; all without one.

    Raises:
        FrameError: the crop reaches outside the image.
    """
    if crop is None:
        return image
    try:
        crop.check((image.shape[0], image.shape[1]))
    except UserError as error:
        raise FrameError(str(error)) from None
    return cast(Image, image[crop.top : crop.bottom, crop.left : crop.right])


@dataclass(frozen=True)
class Georeference:
    """Place an image on the earth.

    ``x_left``, ``y_top``: coordinates of the upper left corner of the upper left pixel in the projection's
    ``unit``; ``pixel_size_y`` is negative where row 0 is north. Unknown numbers are NaN.
    """

    projection: str = ""
    unit: str = "m"
    pixel_size_x: float = float("nan")
    pixel_size_y: float = float("nan")
    x_left: float = float("nan")
    y_top: float = float("nan")

    def cropped(self, crop: Crop) -> Georeference:
        """Place the cropped image."""
        return replace(
            self,
            x_left=self.x_left + crop.left * self.pixel_size_x,
            y_top=self.y_top + crop.top * self.pixel_size_y,
        )


class ReadFrame(Protocol):
    """Read one file, and of its image the pixels of ``crop``, or all with None; FrameError if it cannot."""

    def __call__(self, path: Path, crop: Crop | None) -> Frame: ...


@dataclass(frozen=True)
class Source:
    """Describe how one provider's files are found and read; every function is picklable.

    ``read_time(path)`` reads the time alone, cheaply. ``crop`` is the default crop, None = the 288 x 288
    pixels at the centre.
    """

    name: str
    suffixes: tuple[str, ...]
    read_time: Callable[[Path], datetime]
    read: ReadFrame
    georeference: Callable[[Path], Georeference]
    licence: str
    crop: Crop | None = None
    options: dict[str, object] = field(default_factory=dict)
