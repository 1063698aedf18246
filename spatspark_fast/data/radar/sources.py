"""Choose a source of radar files by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.radar.fmi import FMI
from spatspark_fast.data.radar.frames import Source
from spatspark_fast.data.radar.knmi import KNMI
from spatspark_fast.data.radar.mch import MCH
from spatspark_fast.data.radar.pysteps import pysteps_source

__all__ = ["get_source"]


def get_source(name: str, options: Mapping[str, Any] | None = None, time_format: str | None = None) -> Source:
    """Return the built-in source ``knmi``, ``mch`` or ``fmi``, or else pysteps' importer of that name.

    ``options`` and ``time_format`` (a strptime pattern in the file names) are for pysteps' importers only.

    Raises:
        UserError: no such source, pysteps is not installed, or options for a source that has none.
    """
    for source in (KNMI, MCH, FMI):
        if source.name == name:
            if options or time_format:
                raise UserError(
                    f"--importer_options and --time_format are for pysteps' importers; --source {name} "
                    f"reads everything from the files"
                )
            return source
    return pysteps_source(name, options or {}, time_format)
