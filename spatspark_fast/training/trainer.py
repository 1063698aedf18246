"""Set a training up: Lightning's trainer, the plan, the place in it, the run directory."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from spatspark_fast.common.errors import UserError
from spatspark_fast.training.checkpoints import AtomicCheckpointIO
from spatspark_fast.training.metrics import MetricsCsv, trim_metrics
from spatspark_fast.training.options import OptimOptions, TrainerOptions
from spatspark_fast.training.rundir import RunDirectory
from spatspark_fast.training.samedata import check_same
from spatspark_fast.training.schedules import Plan, make_plan
from spatspark_fast.training.stream import BatchStream

__all__ = ["complete", "known_warnings_off", "make_trainer", "open_run", "plan_of", "prepare_process", "take_up"]

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def prepare_process(threads: int) -> None:
    """Set the threads of a CPU (0 leaves torch's choice), and silence Lightning's tips and advertisements."""
    if threads:
        torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def known_warnings_off() -> Iterator[None]:
    """Ignore warnings about Lightning's own code, which nobody here can change."""
    with warnings.catch_warnings():
        # Lightning 2.6 flattens its loaders by a class that torch 2.10 and later call deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        # Frozen parts are meant to be in evaluation mode.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        yield


def make_trainer(
    options: TrainerOptions,
    run: RunDirectory,
    callbacks: list[L.Callback],
    state: dict[str, Any] | None,
    columns: Sequence[str],
) -> L.Trainer:
    """Make the trainer of a run that goes on from ``state``, if any; ``columns`` are those of metrics.csv.

    Raises UserError for devices that are not there.
    """
    loggers: list[Logger] = [MetricsCsv(run.metrics, columns)]
    if options.tensorboard:
        purge = {} if state is None else {"purge_step": state["global_step"] + 1}
        loggers.append(TensorBoardLogger(run.root, name="", version="tensorboard", **purge))
    try:
        trainer = L.Trainer(
            accelerator=options.device,
            devices=options.devices if options.devices == "auto" else int(options.devices),
            precision=PRECISIONS[options.precision],
            max_epochs=options.epochs,
            accumulate_grad_batches=options.accumulate,
            logger=loggers,
            log_every_n_steps=1,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # BatchStream gives each rank its share
            default_root_dir=run.root,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise UserError(f"--trainer.device {options.device} with {options.devices} devices: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else trainer.world_size
    if started != trainer.world_size:
        raise UserError(
            f"torchrun started {started} processes for a training on {trainer.world_size} devices: give "
            f"--trainer.devices {started}, or start it without torchrun"
        )
    return trainer


def plan_of(trainer: TrainerOptions, optim: OptimOptions, stream: BatchStream) -> Plan:
    """Return the plan that options and the batches of an epoch make."""
    return make_plan(
        batches_per_epoch=stream.batches_per_epoch,
        epochs=trainer.epochs,
        max_steps=trainer.max_steps,
        accumulate=trainer.accumulate,
        warmup_epochs=optim.warmup_epochs,
        windows_per_batch=stream.batch_size * stream.world_size,
        base_lr=optim.base_lr,
        final_lr=optim.final_lr,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
    )


def take_up(
    state: dict[str, Any] | None, plan: Plan, stream: BatchStream, data: dict[str, Any], checkpoint: Path | None
) -> bool:
    """Bring the stream to the place of a checkpoint's ``state``, if there is one; tell whether that is the end.

    ``data`` is what `samedata` says of the windows. Raises UserError if that place means another one now.
    """
    if state is None:
        return False
    if state["batches_per_epoch"] != plan.batches_per_epoch:
        raise UserError(
            f"{checkpoint} is of a run with {state['batches_per_epoch']} batches an epoch, now there are "
            f"{plan.batches_per_epoch}: the data, --data.batch_size or the number of devices changed; "
            "give the same again, or start a new run"
        )
    check_same(state, data, checkpoint)
    stream.load_state_dict(state)  # Lightning restores a loader only within an epoch
    return state["global_step"] >= plan.total_steps


def complete(
    run: RunDirectory,
    state: dict[str, Any],
    checkpoint: Path | None,
    trainer: L.Trainer,
    more: str = "give more --trainer.epochs (or --trainer.max_steps) to go on",
) -> str | None:
    """Say that a run whose training is at its end is complete; where files are missing, train no more and return None.

    Raises UserError if the checkpoint is not the newest one of the run.
    """
    step = state["global_step"]
    if checkpoint is None or checkpoint.absolute() != run.last.absolute():
        raise UserError(f"{checkpoint} is at step {step}, so it is complete: {more}")
    if run.finished(step):
        return f"{run.root} is complete, at step {step}: {more}"
    trainer.limit_train_batches = 0  # Lightning loads the checkpoint, and that is all
    return None


def open_run(
    run: RunDirectory,
    plain: dict[str, Any],
    device: torch.device,
    state: dict[str, Any] | None,
    checkpoint: Path | None,
) -> None:
    """Make the run directory ready, and write down options (``plain``), versions and seed."""
    run.prepare()
    run.save_config(plain)
    run.save_versions(plain["trainer"]["seed"], str(device), None if checkpoint is None else str(checkpoint))
    trim_metrics(run.metrics, 0 if state is None else state["global_step"])
