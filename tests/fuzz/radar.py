"""Damaged raw radar files: real ones of every provider where SPATSPARK_RADAR names their folder, else one of ours."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from spatspark_fast.data.radar.fmi import FMI
from spatspark_fast.data.radar.frames import Source
from spatspark_fast.data.radar.knmi import KNMI
from spatspark_fast.data.radar.mch import MCH

from ..prepare.archives import write_archive
from .damage import damaged
from .outcomes import Suite, Verdict, judge_call, wrong

FILES = [(KNMI, "knmi_201008/*.h5"), (MCH, "mch_20160711/*.gif"), (FMI, "fmi_pgm_20160928/*.pgm.gz")]
MOST = 10_000.0  # mm in 5 minutes: above the scale of every provider, whose last step is 6,560 mm


def prepare(folder: Path) -> None:
    """Copy the smallest file of each provider, or write one in KNMI's layout."""
    real = os.environ.get("SPATSPARK_RADAR")
    if real is None:
        write_archive(folder / KNMI.name, [0])
        return
    for source, pattern in FILES:
        smallest = min(Path(real).glob(pattern), key=lambda path: path.stat().st_size)
        (folder / source.name).mkdir()
        shutil.copy(smallest, folder / source.name)


def attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    """Damage a file and read it as `prepare` and `forecast` do."""
    source = random.choice([source for source, _ in FILES if (folder / source.name).is_dir()])
    (whole,) = (folder / source.name).iterdir()
    path = scratch / whole.name
    path.write_bytes(damaged(random, whole.read_bytes()))
    return judge_call(partial(_read, source, path))


def _read(source: Source, path: Path) -> Verdict | None:
    source.read_time(path)
    frame = source.read(path, None)
    source.georeference(path)
    seen = frame.rain[frame.valid]
    return None if (np.isfinite(seen) & (seen >= 0) & (seen <= MOST)).all() else wrong("values that are no rain")


SUITE = Suite(prepare, attempt)
