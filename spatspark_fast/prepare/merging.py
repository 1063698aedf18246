"""Put windows of several prepared files into one, to train on more than one radar network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import atomic_path
from spatspark_fast.data.synthetic import SyntheticRadar

__all__ = ["merge_archives"]

NAMES = ("images", "valid", "timestamps")


def merge_archives(
    files: Sequence[Path], out: Path, test: Path | None = None, synthetic: int = 0, seed: int = 0
) -> dict[str, int]:
    """Write ``out`` with the training windows of all ``files`` in turn, and the test windows of ``test``.

    All are files of ``python -m spatspark_fast.prepare``. Without ``test`` the first file gives the test windows; a
    ``test`` that has none of its own gives its training windows, since none of them is trained on. Windows are
    kept uncompressed, for they are read in every epoch. So many ``synthetic`` windows (`SyntheticRadar` with
    ``seed``) are added to those that train, for a pretraining that wants more rain. Returns the number of windows of
    each split.

    Raises UserError if a file cannot be read, has another scale or shape than the first, or if ``test`` without test
    windows is among ``files``; ``out`` is then not written.
    """
    with atomic_path(out) as part, h5py.File(part, "w") as target:
        attributes: dict[str, Any] = {}
        for path in files:
            with _opened(path) as source:
                attributes = attributes or dict(source.attrs)
                _check_scale(source, path, attributes)
                _append(source, "train", target, "train", path)
        _append_synthetic(target, synthetic, seed, attributes["scale_mm_per_5min"])
        last = test or files[0]
        with _opened(last) as source:
            _check_scale(source, last, attributes)
            own = len(cast(h5py.Dataset, source["test/images"]))
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


def _check_scale(source: h5py.File, path: Path, attributes: dict[str, Any]) -> None:
    scales = source.attrs["scale_mm_per_5min"], attributes["scale_mm_per_5min"]
    if scales[0] != scales[1]:
        raise UserError(f"{path} has scale {scales[0]}, not {scales[1]}: prepare all files with one --scale")


def _append(source: h5py.File, split: str, target: h5py.File, to: str, path: Path) -> None:
    for name in NAMES:
        windows = cast(h5py.Dataset, source[f"{split}/{name}"])
        key, shape = f"{to}/{name}", windows.shape[1:]
        if key not in target:
            target.create_dataset(key, (0, *shape), windows.dtype, maxshape=(None, *shape), chunks=(1, *shape))
        written = cast(h5py.Dataset, target[key])
        if written.shape[1:] != shape:
            raise UserError(f"{path} has windows of {shape}, not {written.shape[1:]} frames, rows and columns")
        start = len(written)
        written.resize(start + len(windows), axis=0)
        for index in range(len(windows)):
            written[start + index] = np.asarray(windows[index])


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
