"""Write metrics.csv row by row, and cut off rows that a run does again."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from spatspark_fast.common.errors import UserError
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
    """Drop the rows of a ``metrics.csv`` after an optimiser step, and a last row that was cut off.

    Raises UserError for a file that is damaged anywhere else; it stays as it is.
    """
    if not path.exists():
        return
    try:
        text = path.read_text()
        rows = list(csv.reader(io.StringIO(text)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; repair it, or move it away") from error
    if len(rows) < 2 and not text.endswith("\n"):  # killed within the first line
        path.unlink()
        return
    header = rows[0]
    column = header.index("step") if "step" in header else None
    for number, row in enumerate(rows[1:], 2):
        if column is None or len(row) != len(header) or not (row[column].isascii() and row[column].isdigit()):
            if column is not None and number == len(rows):
                rows.pop()
                break
            raise UserError(f"{path} is damaged in line {number}: repair it, or move it away")
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows[1:] if int(row[column or 0]) <= step)])
