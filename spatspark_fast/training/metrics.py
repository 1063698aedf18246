"""Write metrics.csv row by row."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["MetricsCsv"]


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
        with self.path.open("a", newline="") as file:
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
