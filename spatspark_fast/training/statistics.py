"""Batch norms train on the statistics of a batch: say in one sentence where it has too few values for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spatspark_fast.common.errors import UserError

__all__ = ["enough_values"]


@contextmanager
def enough_values(windows: int) -> Iterator[None]:
    """Raise `UserError` where PyTorch finds one value of a channel in a batch of so many ``windows``."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"a batch of {windows} windows gives a norm one value of each channel, and so no statistics to train with: "
            "take a larger --data.batch_size, larger images or a larger --data.crop"
        ) from error
