"""What a split of an NL-50 file must look like; whatever does not is named in one sentence, before it is read."""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from spatspark_fast.common import units
from spatspark_fast.common.errors import UserError
from spatspark_fast.data.hdf5 import BROKEN, check_memory, check_stored, member, why

__all__ = ["Split", "find_split", "interval_of", "read_attributes", "scale_of"]

_logger = logging.getLogger(__name__)

LONGEST_INTERVAL = 24 * 60  # minutes
LONGEST_TIME = 1000  # bytes of a timestamp


@dataclass(frozen=True)
class Split:
    """Hold the data sets of a split: ``images`` ``(N, T, H, W)``, ``valid`` of the same shape, ``timestamps``.

    ``valid`` and ``timestamps`` are None where the file does not say.
    """

    images: h5py.Dataset
    valid: h5py.Dataset | None
    timestamps: h5py.Dataset | None


def find_split(file: h5py.File, path: Path, split: str, empty: bool = False) -> Split:
    """Return the data sets of a split, which may have no windows if ``empty``.

    Raises UserError naming the file, the data set, and what is wrong: it is missing, is no data set, has another shape
    or type, was never written as a whole, lies in other files, or takes more memory than there is.
    """
    if member(file, path, split) is None:
        names = ", ".join(ascii(name)[1:-1] for name in list(file)[:20])
        raise UserError(f"{path} has no split {split!r}; it holds {names or 'nothing'}")
    images, valid, times = (_data(file, path, split, name) for name in ("images", "valid", "timestamps"))
    if images is None:
        raise UserError(f"{path} has no data set {split}/images, so it is not in the layout of NL-50")
    shape = images.shape
    if len(shape) != 4 or images.dtype.kind != "f":
        raise UserError(
            f"{path}: {split}/images is {images.dtype} of shape {shape}, not floating point of shape "
            f"(windows, frames, height, width); python -m spatspark_fast.prepare makes such files"
        )
    if shape[0] == 0 and not empty:
        raise UserError(f"{path}: split {split!r} is empty; prepare it with more data or another --test_fraction")
    if 0 in shape[1:]:
        raise UserError(f"{path}: {split}/images has windows of {shape[1:]} frames, rows and columns; prepare it again")
    if valid is not None and (valid.shape != shape or valid.dtype.kind not in "bui"):
        raise UserError(
            f"{path}: {split}/valid is {valid.dtype} of shape {valid.shape}, not bool of {shape}, the shape of images; "
            "prepare it again, or remove it"
        )
    if times is not None:
        times = _times(times, shape[:2], f"{path}: {split}/timestamps")
    for data in (images, valid, times):
        if data is not None:
            _check(data, f"{path}: {split}/{(data.name or '').rpartition('/')[2]}")
    return Split(images, valid, times)


def _data(file: h5py.File, path: Path, split: str, name: str) -> h5py.Dataset | None:
    """Return a data set with a type that numpy has, None if there is none."""
    found = member(file, path, f"{split}/{name}")
    if found is None:
        return None
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path}: {split}/{name} is a group, no data set, so it is not in the layout of NL-50")
    try:
        if found.shape is None:
            raise UserError(f"{path}: {split}/{name} is empty; prepare it again")
        _ = found.dtype
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{path}: {split}/{name} {why(error)}") from error
    return found


def _times(times: h5py.Dataset, windows: tuple[int, ...], where: str) -> h5py.Dataset | None:
    """Return the data set of times if it holds text; raise UserError if that is not one for each frame."""
    if h5py.check_string_dtype(times.dtype) is None:
        return None
    if times.shape[:1] != windows[:1] or math.prod(times.shape[1:]) != windows[1]:
        raise UserError(
            f"{where} has the shape {times.shape}, not one time for each of {windows[0]} x {windows[1]} frames; "
            "prepare it again, or remove it"
        )
    if times.dtype.itemsize > LONGEST_TIME:
        raise UserError(f"{where} holds texts of {times.dtype.itemsize} bytes, no times; prepare it again")
    return times


def _check(data: h5py.Dataset, where: str) -> None:
    try:
        check_memory(data, where)
        check_stored(data, where)
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{where} {why(error)}") from error


def read_attributes(file: h5py.File, path: Path) -> dict[str, object]:
    """Return the attributes of a file as plain values; raise UserError for one that cannot be read."""
    found: dict[str, object] = {}
    name = ""
    try:
        for name in file.attrs:
            found[name] = _plain(file.attrs[name])
    except BROKEN as error:
        raise UserError(f"{path}: the attribute {name!a} {why(error)}") from error
    return found


def scale_of(attributes: Mapping[str, object], path: Path) -> float:
    """Return the mm per 5 min of data value 1: that of NL-50, with a warning, where the file does not say."""
    scale = attributes.get("scale_mm_per_5min")
    if scale is None:
        _logger.warning("%s does not say its scale; taking that of NL-50, %s mm per 5 min", path, units.NL50_SCALE)
        return units.NL50_SCALE
    try:
        return units.check_scale(scale)
    except UserError as error:
        raise UserError(f"{path}: attribute {error}; correct it, or prepare the file again") from None


def interval_of(attributes: Mapping[str, object], path: Path) -> float:
    """Return the minutes between two frames, 5 where the file does not say."""
    minutes = attributes.get("interval_minutes", units.FRAME_MINUTES)
    if isinstance(minutes, int | float) and 0 < minutes <= LONGEST_INTERVAL:
        return float(minutes)
    raise UserError(
        f"{path}: attribute interval_minutes is {reprlib.repr(minutes)}, no number of minutes between frames; "
        "correct it, or prepare the file again"
    )


def _plain(value: object) -> object:
    """Turn what h5py gives for an attribute into a plain Python value."""
    array = np.asarray(value)
    if array.size != 1:
        return array.tolist()
    item = array.reshape(-1)[0]
    item = item.item() if isinstance(item, np.generic) else item
    return item.decode(errors="replace") if isinstance(item, bytes) else item
