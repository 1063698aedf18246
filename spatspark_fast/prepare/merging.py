"""Put windows of several prepared files into one, to train on more than one radar network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from spatspark_fast.common.errors import UserError
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
            with _opened(path) as source:
                attributes = attributes or dict(source.attrs)
                _check_scale(source, path, attributes)
                _append(source, "train", target, "train", path)
            below.check()  # a full disk is told early
        _append_synthetic(target, synthetic, seed, attributes["scale_mm_per_5min"])
        last = test or files[0]
        with _opened(last) as source:
            _check_scale(source, last, attributes)
            own = len(_dataset(source, "test/images", last)) if "test" in source else 0
            if not own and last.resolve() in {path.resolve() for path in files}:
                raise UserError(f"{last} has no test windows, and its training windows are trained on")
            _append(source, "test" if own else "train", target, "test", last)
        names = [path.name for path in files] + ([f"{synthetic} synthetic"] if synthetic else [])
        target.attrs.update(attributes | {"merged_from": ", ".join(names)})
        return {split: len(cast(h5py.Dataset, target[f"{split}/images"])) for split in ("train", "test")}


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _dataset(source: h5py.File, name: str, path: Path) -> h5py.Dataset:
    found = source.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path} has no {name}: merge files that prepare has written")
    return found


def _check_scale(source: h5py.File, path: Path, attributes: dict[str, Any]) -> None:
    scales = source.attrs.get("scale_mm_per_5min"), attributes.get("scale_mm_per_5min")
    if scales[0] is None:
        raise UserError(f"{path} has no attribute scale_mm_per_5min: merge files that prepare has written")
    if scales[0] != scales[1]:
        raise UserError(f"{path} has scale {scales[0]}, not {scales[1]}: prepare all files with one --scale")


def _append(source: h5py.File, split: str, target: h5py.File, to: str, path: Path) -> None:
    for name in NAMES:
        windows = _dataset(source, f"{split}/{name}", path)
        key, shape = f"{to}/{name}", windows.shape[1:]
        if key not in target:
            target.create_dataset(key, (0, *shape), windows.dtype, maxshape=(None, *shape), chunks=(1, *shape))
        written = cast(h5py.Dataset, target[key])
        if written.shape[1:] != shape:
            raise UserError(f"{path} has windows of {shape}, not {written.shape[1:]} frames, rows and columns")
        start = len(written)
        written.resize(start + len(windows), axis=0)
        for index in range(len(windows)):
            written[start + index] = _read(windows, index, path)


def _read(windows: h5py.Dataset, index: int, path: Path) -> np.ndarray:
    try:
        return np.asarray(windows[index])
    except OSError as error:
        raise UserError(f"{path} is damaged, {windows.name} window {index}: {error}; prepare it again") from error


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
