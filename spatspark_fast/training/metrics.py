"""Write metrics.csv row by row, and cut off rows that a run does again."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from spatspark_fast.common.files import atomic_path, writing

__all__ = ["MetricsCsv", "trim_metrics"]


class MetricsCsv(Logger):
    """Append one row per logged step to a CSV file, at once, so that a kill loses none.

    Lightning's own CSV logger starts a file anew when a run goes on.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self.columns = columns

    @property
    def name(self) -> str:
        """Return the name that Lightning asks for."""
        return "csv"

    @property
    def version(self) -> str:
        """Return the version that Lightning asks for."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the options are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; what is not in ``columns`` is left out."""
        columns = self._columns_there()
        row = {"step": step, **metrics}
        with writing(self.path), self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns or self.columns, extrasaction="ignore", restval="")
            if columns is None:
                writer.writeheader()
            writer.writerow(row)

    def _columns_there(self) -> Sequence[str] | None:
        """Return the columns that the file has: those of an older version, where such a run goes on."""
        if not self.path.exists():
            return None
        with self.path.open(newline="") as file:
            return next(csv.reader(file), None)


def trim_metrics(path: Path, step: int) -> None:
    """Drop the rows of a ``metrics.csv`` after an optimiser step, and a last row that was cut off."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows or "step" not in rows[0]:
        path.unlink()
        return
    header, column = rows[0], rows[0].index("step")
    whole = [row for row in rows[1:] if len(row) == len(header) and row[column].isdigit()]
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in whole if int(row[column]) <= step)])
