"""What Linux says of the processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["processor_fields"]


@cache
def processor_fields() -> dict[str, str]:
    """Return the fields of the first core in ``/proc/cpuinfo``, such as ``flags``; nothing where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}
