"""Show how far a training has come."""

import contextlib
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spatspark_fast.training.recorder import Recorder

__all__ = ["Bar"]


class Bar(L.Callback):
    """Show one bar for the whole training on a terminal, and one line per epoch elsewhere."""

    def __init__(self, recorder: Recorder, console: Console) -> None:
        self.recorder = recorder
        self.console = console
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw the bar."""
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        total = pl_module.plan.total_steps
        self._task = progress.add_task("", total=total, completed=trainer.global_step, epoch="", metrics="")
        progress.start()
        self._progress = progress

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            epoch = f"epoch {min(int(pl_module.epochs_done) + 1, pl_module.plan.epochs)}/{pl_module.plan.epochs}"
            self._progress.update(
                self._task, completed=trainer.global_step, epoch=epoch, metrics=describe(self.recorder.newest)
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say how the epoch went where there is no terminal."""
        if self._progress is None and trainer.is_global_zero:
            epoch = f"epoch {pl_module.epochs_done:.4g}/{pl_module.plan.epochs}"
            mean = f"mean loss {self.recorder.epoch_loss:.4f}"
            speed = describe(self.recorder.newest).partition("  ")[2]
            self.console.print(f"{epoch}  step {trainer.global_step}  {mean}  {speed}", soft_wrap=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let the bar stand."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let the bar stand."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._progress.stop()
            self._progress = None


def describe(row: dict[str, float]) -> str:
    """Say a row of metrics in a few words."""
    if not row:
        return ""
    return (
        f"loss {row['loss']:.4f}  {row['images_per_s']:.1f} images/s  "
        f"{100 * row['data_wait_share']:.0f} % waiting for data"
    )
