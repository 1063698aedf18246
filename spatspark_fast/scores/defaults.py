"""What is scored by default; apart from torch, so that ``--help`` is quick."""

__all__ = ["FSS_SCALES", "THRESHOLDS"]

THRESHOLDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Thresholds in mm/h."""

FSS_SCALES = (1, 5, 15, 31)
"""Sides in pixels of the neighbourhoods of the fractions skill score."""
