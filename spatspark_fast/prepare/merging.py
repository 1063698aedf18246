"""Put windows of several prepared files into one, to train on more than one radar network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.units import check_scale
from spatspark_fast.data.hdf5 import member, open_hdf5, read_row, write_attributes
from spatspark_fast.data.layout import find_split, read_attributes
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.prepare.output import hdf5_output

__all__ = ["merge_files"]

NAMES = ("images", "valid", "timestamps")


def merge_files(
    files: Sequence[Path], out: Path, test: Path | None = None, synthetic: int = 0, seed: int = 0
) -> dict[str, int]:
    """Write ``out`` with the training windows of all ``files`` in turn, and the test windows of ``test``.

    All are files of ``python -m spatspark_fast.prepare``. Without ``test`` the first file gives the test windows; a
    ``test`` that has none of its own gives its training windows, since nothing is trained on them. Windows are not
    compressed, because they are read in every epoch. ``synthetic`` is the number of made-up windows (`SyntheticRadar`
    with ``seed``) that are added for training. Returns the number of windows of each split.

    Raises:
        UserError: a file cannot be read, is no file of prepare, has another scale or shape than the first; ``test``
            has no test windows and is among ``files``; ``synthetic`` is negative. ``out`` is then not written.
    """
    if synthetic < 0:
        raise UserError(f"--data.synthetic_windows is {synthetic}: give a number of at least 0")
    with hdf5_output(out) as (target, below):
        attributes: dict[str, Any] = {}
        for path in files:
            with open_hdf5(path) as source:
                found = read_attributes(source, path)
                attributes = attributes or found
                _check_scale(found, path, attributes)
                _append(source, "train", target, "train", path)
            below.check()  # a full disk is told early
        _append_synthetic(target, synthetic, seed, attributes["scale_mm_per_5min"])
        last = test or files[0]
        with open_hdf5(last) as source:
            _check_scale(read_attributes(source, last), last, attributes)
            images = member(source, last, "test/images")
            own = images.shape[0] if isinstance(images, h5py.Dataset) and images.shape else 0
            if not own and last.resolve() in {path.resolve() for path in files}:
                raise UserError(f"{last} has no test windows, and its training windows are trained on")
            _append(source, "test" if own else "train", target, "test", last)
        names = [path.name for path in files] + ([f"{synthetic} synthetic"] if synthetic else [])
        write_attributes(target, attributes | {"merged_from": ", ".join(names)})
        return {split: len(cast(h5py.Dataset, target[f"{split}/images"])) for split in ("train", "test")}


def _check_scale(found: dict[str, Any], path: Path, attributes: dict[str, Any]) -> None:
    scale, first = found.get("scale_mm_per_5min"), attributes.get("scale_mm_per_5min")
    if scale is None:
        raise UserError(f"{path} has no attribute scale_mm_per_5min: merge files that prepare has written")
    try:
        check_scale(scale)
    except UserError as error:
        raise UserError(f"{path}: attribute {error}; merge files that prepare has written") from None
    if scale != first:
        raise UserError(f"{path} has scale {scale}, not {first}: prepare all files with one --scale")


def _append(source: h5py.File, split: str, target: h5py.File, to: str, path: Path) -> None:
    found = find_split(source, path, split, empty=True)
    for name in NAMES:
        windows: h5py.Dataset | None = getattr(found, name)
        if windows is None:
            raise UserError(f"{path} has no {split}/{name}: merge files that prepare has written")
        key, shape = f"{to}/{name}", windows.shape[1:]
        if key not in target:
            options = {"maxshape": (None, *shape), "chunks": (1, *shape), "fletcher32": windows.dtype.kind != "O"}
            target.create_dataset(key, (0, *shape), windows.dtype, **options)
        written = cast(h5py.Dataset, target[key])
        if written.shape[1:] != shape:
            raise UserError(f"{path} has windows of {shape}, not {written.shape[1:]} frames, rows and columns")
        start = len(written)
        written.resize(start + len(windows), axis=0)
        for index in range(len(windows)):
            written[start + index] = read_row(windows, index, f"{path}, {split} window {index}: {name}")


def _append_synthetic(target: h5py.File, count: int, seed: int, scale: float) -> None:
    """Append made-up windows of the shape of those that are there."""
    if count < 1:
        return
    images, valid, times = (cast(h5py.Dataset, target[f"train/{name}"]) for name in NAMES)
    start, frames, height, width = images.shape
    radar = SyntheticRadar(count, frames, 0, (height, width), seed)
    for data in (images, valid, times):
        data.resize(start + count, axis=0)
    for index in range(count):
        images[start + index] = radar[index]["input"].numpy() * (radar.scale / scale)
        valid[start + index] = True
        times[start + index] = np.array(radar.timestamps(index), dtype="S")[:, None]
