"""Checkpoints that a kill cannot tear, and a clean end on a signal."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from spatspark_fast.common.errors import RunStopped, UserError
from spatspark_fast.common.files import atomic_path, load_plain, writing
from spatspark_fast.common.options import check_types
from spatspark_fast.common.signals import signals_as, stopping
from spatspark_fast.models.weights import check_weights
from spatspark_fast.training.module import PlannedTraining
from spatspark_fast.training.options import notes_on_old, under_new_names
from spatspark_fast.training.rundir import RunDirectory

__all__ = ["AtomicCheckpointIO", "Checkpoints", "read_checkpoint"]

COUNTS = ("position", "global_step", "batches_per_epoch")
ENTRIES: dict[str, Any] = {
    **dict.fromkeys(COUNTS, int),
    **dict.fromkeys(("config", "state_dict", "loops", "callbacks", "data"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    "data": dict | None,
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the checkpoint of a training onto the CPU, plain values and tensors only.

    Raises `UserError` if the file is missing, damaged, or no checkpoint of a training.
    """
    checkpoint = load_plain(path, "a training")
    if not isinstance(checkpoint, dict) or not {"config", "position", "state_dict", "global_step"} <= set(checkpoint):
        raise UserError(f"{path} is no checkpoint of a training: it lacks the options or the position")
    try:
        check_types({name: checkpoint[name] for name in ENTRIES if name in checkpoint}, ENTRIES)
        groups = dict.fromkeys(checkpoint["config"], dict | None) | {"init": str | None}
        config = check_types(checkpoint["config"], groups)
    except UserError as error:
        raise UserError(f"{path} is damaged or was edited ({error}); go on from another checkpoint") from None
    if min(checkpoint.get(name, 0) for name in COUNTS) < 0:
        raise UserError(f"{path} was edited: a count of steps or batches in it is negative; go on from another one")
    check_weights(checkpoint["state_dict"], path)
    return checkpoint | {"config": under_new_names(config), "notes": notes_on_old(config)}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary file beside the target, flush it to disk, then rename.

    Lightning's own way goes through the system's folder for temporary files, and a move from there to
    another file system is a copy that a kill can cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save so that ``path`` is always a whole checkpoint, the old or the new one."""
        target = Path(path)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load plain values and tensors only."""
        return read_checkpoint(Path(path))


class Checkpoints(Checkpoint):
    """Write ``last.ckpt`` after every epoch, at the last step and on a signal; keep some epochs for good.

    A signal (SIGINT, SIGTERM, SIGHUP) is answered after the current optimiser step, a second one at once. Checkpoint
    callbacks run after all others, so what is saved is complete.
    """

    def __init__(self, run: RunDirectory, keep_every: int, poll_every: int) -> None:
        self.run = run
        self.keep_every = keep_every
        self.poll_every = poll_every
        self.signum: int | None = None
        self._owner = os.getpid()
        self._signals = contextlib.ExitStack()
        self._at_once = stopping(self._last)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self._signals.enter_context(signals_as(self._on_signal))

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            self._at_once(signum, frame)
        elif os.getpid() == self._owner:
            self.signum = signum

    def _last(self, name: str) -> str:
        whole = str(self.run.last) if self.run.last.exists() else "none yet"
        return f"stopped at once by {name}; the last whole checkpoint is {whole}"

    def _stop_asked(self, trainer: L.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.signum is not None
        if trainer.global_step % self.poll_every:
            return False  # processes must agree, and asking each other costs time
        return trainer.strategy.reduce_boolean_decision(self.signum is not None, all=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop where a signal or the last step asks for it; the end of an epoch has its own hook."""
        module = _ours(pl_module)
        if module.epoch_complete or not module.between_steps:
            return
        if trainer.global_step >= module.plan.total_steps:
            self._save(trainer, module)
            trainer.should_stop = True
        elif self._stop_asked(trainer):
            self._save(trainer, module)
            raise self._stopped(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; an epoch that was broken off has been saved already."""
        module = _ours(pl_module)
        if not module.epoch_complete:
            return
        self._save(trainer, module)
        epoch = round(module.epochs_done)
        if trainer.is_global_zero and self.keep_every and epoch % self.keep_every == 0:
            _link(self.run.last, self.run.kept(epoch))
        if trainer.global_step >= module.plan.total_steps:
            trainer.should_stop = True
        elif self._stop_asked(trainer):
            raise self._stopped(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._signals.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._signals.close()

    def _save(self, trainer: L.Trainer, module: PlannedTraining[Any]) -> None:
        module.check_finite()
        trainer.save_checkpoint(self.run.last)

    def _stopped(self, trainer: L.Trainer) -> RunStopped:
        signum = self.signum or signal.SIGTERM
        name = signal.Signals(signum).name
        message = f"stopped by {name} after step {trainer.global_step}; saved {self.run.last}"
        return RunStopped(signum, f"{message}; go on with --out {self.run.root} --resume")


def _ours(module: L.LightningModule) -> PlannedTraining[Any]:
    if not isinstance(module, PlannedTraining):
        raise TypeError(f"this callback serves planned trainings, got {type(module).__name__}")
    return module


def _link(source: Path, target: Path) -> None:
    """Give a file a second name without copying it, where the file system can."""
    link: Callable[[Path, Path], Any] = os.link
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
