"""Tell whether a run that goes on sees the data that it was begun with."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.resident.store import WindowStore
from spatspark_fast.data.windows import WholeWindows

__all__ = ["check_same", "mark_of"]

SAMPLED = 8  # windows that are read, spread over the file
WORDS = {
    "windows": "number of windows",
    "shape": "frames, rows and columns of a window",
    "scale": "scale in mm per 5 min",
    "numbers": "choice of the windows that train",
    "sample": "values",
    "all": "values",
}


def mark_of(windows: WholeWindows, numbers: Sequence[int], store: WindowStore | None) -> dict[str, Any]:
    """Return plain values by which a checkpoint knows its data again, wherever they lie and however packed.

    Seen are the number of windows, which of them train (``numbers``), their shape and scale, and every value of
    `SAMPLED` windows that are spread over the file; every value of all, if both sessions have the windows in memory
    (``store``). Not seen are other changed values, and of the synthetic radar any.
    """
    file = windows.windows
    size = file.stored_size if isinstance(file, NowcastDataset) else windows.image_size
    mark: dict[str, Any] = {"windows": len(windows), "shape": [windows.frames, *size], "scale": windows.scale}
    mark["numbers"] = zlib.crc32(np.asarray(numbers, "<i8").tobytes())
    if isinstance(file, NowcastDataset):
        places = np.linspace(0, len(windows) - 1, min(SAMPLED, len(windows))).round().astype(int)
        digest = hashlib.blake2b(digest_size=16)
        for place in places:
            digest.update(np.ascontiguousarray(windows.untreated(int(place)), "<f4").data)
        mark["sample"] = digest.hexdigest()
        if store is not None and store.checksum is not None:
            mark["all"] = store.checksum
    return mark


def check_same(state: dict[str, Any], mark: dict[str, Any], checkpoint: Path | None) -> None:
    """Compare data with those of a checkpoint's ``state``; what either of them does not know is not compared.

    Raises:
        UserError: they are others; the sentence says in what.
    """
    before = state.get("data") or {}
    for name, words in WORDS.items():
        if name in before and name in mark and before[name] != mark[name]:
            raise UserError(
                f"{checkpoint} was trained on other data, which differ in the {words}: give --data.path with the same "
                "windows, or start a new run"
            )
