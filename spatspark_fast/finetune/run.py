"""Put a finetuning run together, run it, and leave its results behind. Read it from top to bottom."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import notes_on_idle, to_plain
from spatspark_fast.common.plots import save_figure
from spatspark_fast.common.units import mm_per_hour
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.evaluate.pictures import panel_figure
from spatspark_fast.evaluate.scoring import Kept
from spatspark_fast.finetune.config import FinetuneConfig, forecaster_name, forecaster_options, idle_options
from spatspark_fast.finetune.initial import Initial
from spatspark_fast.finetune.module import ForecastTraining, begin_norms
from spatspark_fast.finetune.validation import THRESHOLDS, Validation
from spatspark_fast.finetune.windows import Split, check_rain, hold_out
from spatspark_fast.models.forecaster import Forecaster, Persistence
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.registry import build_forecaster, load_forecaster
from spatspark_fast.models.spatspark import SpatSpark
from spatspark_fast.training.bar import Bar
from spatspark_fast.training.checkpoints import AtomicCheckpointIO, Checkpoints, read_checkpoint
from spatspark_fast.training.cuda_graphs import choose_graphs
from spatspark_fast.training.feed import open_store, open_stream, plain_place
from spatspark_fast.training.notes import (
    TrainingConsole,
    describe_speed,
    describe_training,
    resume_notes,
    speaker,
    start_notes,
)
from spatspark_fast.training.recorder import Recorder
from spatspark_fast.training.restoring import check_state, fit
from spatspark_fast.training.rundir import RunDirectory
from spatspark_fast.training.samedata import mark_of
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.stream import BatchStream
from spatspark_fast.training.trainer import (
    complete,
    make_trainer,
    open_run,
    plan_of,
    prepare_process,
    take_up,
)
from spatspark_fast.training.windows import open_windows, stack_of, wettest

__all__ = ["train"]

COLUMNS = (
    *("step", "epoch", "loss", "lr", "weight_decay", "grad_norm", "images_per_s", "data_wait_share"),
    *("validation_mse", *(f"validation_csi_{threshold:g}" for threshold in THRESHOLDS)),
)
FIRST = 4  # windows that set the norms before the first step


def train(config: FinetuneConfig, run: RunDirectory, initial: Initial | None, checkpoint: Path | None) -> None:
    """Train to the end of the plan, from ``checkpoint`` if there is one; check all input before writing."""
    console, options = TrainingConsole(), config.trainer
    prepare_process(options.threads)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    windows, plain, split = open_split(config)
    check_rain(plain, split.train, "train")
    if split.validation:
        check_rain(plain, split.validation, "validate", THRESHOLDS[1] if options.score == "csi" else None)
    sample = wettest(plain, split.validation) if split.validation else wettest(windows, split.train)
    torch.manual_seed(options.seed)
    model, notes = _model(config, plain, initial)
    grid_shape(windows.image_size, model.multiple)  # raises where it does not fit
    model.check(sample[:, : model.in_length])
    recorder = Recorder(options.log_every)
    validation = _validation(config, plain, split, run, console) if split.validation else None
    callbacks = [recorder, *([validation] if validation else []), Bar(recorder, console)]
    callbacks.append(Checkpoints(run, options.keep_every, options.log_every))
    trainer = make_trainer(options, run, callbacks, state, COLUMNS)
    device = trainer.strategy.root_device
    say = speaker(console, trainer)
    store = open_store(config.data, windows, say)
    stream = open_stream(config.data, windows, store, trainer, options.seed, split.train)
    if validation is not None:
        validation.place = plain_place(config.data, plain, store)
    plan = plan_of(options, config.optim, stream)
    data = mark_of(plain, stream.numbers, store)
    if state is not None:
        check_state(state, plan, trainer, checkpoint)
    at_end = take_up(state, plan, stream, data, checkpoint)
    if state is not None and (words := _complete(run, state, checkpoint, trainer, validation, at_end)) is not None:
        say(words)
        return
    if state is None:
        first = stack_of(windows, split.train[: min(stream.batch_size, FIRST)])
        begin_norms(model.train(), first[:, : model.in_length])
    if trainer.is_global_zero:
        open_run(run, to_plain(config), device, state, checkpoint)
        idle = notes_on_idle(config, idle_options(config))
        for note in (*_announce(config, stream, plan, split), *idle, *notes, *resume_notes(to_plain(config), state)):
            say(note)
    module = ForecastTraining(config, model, plain.scale, plan)
    module.graphs, module.say = choose_graphs(options.graph, device, trainer.world_size, say), say
    module.data = data
    started = time.perf_counter()
    fit(trainer, module, stream, checkpoint)
    if trainer.is_global_zero:
        best = _finish(module, run, sample, validation is not None)
        say(describe_training(module, recorder, time.perf_counter() - started, " (mm/5min)^2"))
        if validation is not None:
            say(f"Best checkpoint: epoch {validation.best_epoch:.4g}, {validation.describe(validation.best)}")
        if recorder.speed.rows:
            run.add_to_session({"speed": recorder.speed.summary()})
            say(describe_speed(recorder.speed, {}))
        run.finish(trainer.global_step, run.best, run.forecast)
        say(
            f"Files in {run.root}: checkpoints/best.ckpt ({best}), checkpoints/last.ckpt, forecast.png, metrics.csv, "
            "config.yaml"
        )


def open_split(config: FinetuneConfig) -> tuple[WholeWindows, WholeWindows, Split]:
    """Open the windows, as training and as validation reads them; and say which train and which validate."""
    data = config.data
    windows = open_windows(data, data.output_length, config.trainer.seed)
    if windows.frames <= windows.past:
        raise UserError(
            f"{data.path}: windows have {windows.past} frames and none to forecast; give a smaller --data.input_length"
        )
    plain = windows if windows.augmentation.idle else open_windows(data, data.output_length, augment=False)
    return windows, plain, hold_out(plain.windows, data.validation_fraction)


def _model(config: FinetuneConfig, windows: WholeWindows, initial: Initial | None) -> tuple[Forecaster, Sequence[str]]:
    """Build the model and fill it; return it with what is worth saying about its weights."""
    kind, options = forecaster_options(config, windows.scale)
    dataset = windows.windows
    model = build_forecaster(kind, dataset.input_length, dataset.output_length, options)
    kept = [] if initial is None else initial.fill(model)
    notes = []
    if initial is not None:
        notes.append(f"Weights from {initial.path}; the translation network begins anew")
        if initial.what == "finetune":
            notes = [f"Weights from {initial.path}"]
        if initial.what == "encoder":
            notes = [f"Encoder from {initial.path}; translation network and decoder begin anew"]
        elif any(name.startswith("decoder.head.") for name in kept):
            why = f"the pretrained one draws {model.in_length} frames of rain"
            what = "change" if config.model.output_norm == "persistence" else "rain"
            notes.append(f"Note: the decoder's last layer begins anew for {model.out_length} frames of {what}: {why}")
    if config.model.freeze != "none" and config.init is not None:
        if not isinstance(model, SpatSpark):
            raise UserError(f"--model.freeze {config.model.freeze} needs encoder and decoder: --model.kind spatspark")
        if initial is not None and initial.what == "encoder" and config.model.freeze != "encoder":
            raise UserError(f"--init {config.init} fills the encoder only, so --model.freeze can be none or encoder")
        model.freeze(config.model.freeze, except_head=any(name.startswith("decoder.head.") for name in kept))
    return model, notes


def _validation(
    config: FinetuneConfig, windows: WholeWindows, split: Split, run: RunDirectory, console: Console
) -> Validation:
    options = config.trainer
    return Validation(
        windows,
        split.validation,
        run.best,
        console,
        every=options.validate_every,
        score=options.score,
        patience=options.patience,
        batch_size=config.data.batch_size,
    )


def _complete(
    run: RunDirectory,
    state: dict[str, Any],
    checkpoint: Path | None,
    trainer: L.Trainer,
    validation: Validation | None,
    at_end: bool,
) -> str | None:
    """Say that a run is complete, at the end of its plan or stopped early; None where anything is left to do."""
    saved = None if validation is None else state["callbacks"].get(validation.state_key)
    if validation is not None and saved is not None:
        validation.load_state_dict(saved)
    if at_end:
        return complete(run, state, checkpoint, trainer)
    if validation is not None and validation.exhausted:
        more = (
            f"it stopped early after {validation.since_best} validations without a better score; give more "
            "--trainer.patience to go on (0 never stops)"
        )
        return complete(run, state, checkpoint, trainer, more)
    return None


def _announce(config: FinetuneConfig, stream: BatchStream, plan: Plan, split: Split) -> list[str]:
    what = f"Finetuning {forecaster_name(config)} on {config.data.path or 'synthetic radar'}"
    lines = start_notes(what, plan, stream, config.data.batch_size, config.optim)
    if split.validation:
        lines.append(
            f"{len(split.train)} windows train, the newest {len(split.validation)} validate; {split.dropped} that "
            "share frames with those are left out"
        )
    else:
        lines.append(f"{len(split.train)} windows train; none is held out, so the last checkpoint counts as the best")
    if not split.timed:
        lines.append("Note: the windows have no readable times, so their order in the file counts as order in time")
    if config.init is None and config.model.kind != "smaat":
        lines.append("Weights are random; --init CKPT takes those of a pretraining")
    return lines


def _finish(module: ForecastTraining, run: RunDirectory, sample: Tensor, validated: bool) -> str:
    """Draw the forecast of the best checkpoint, writing it first where nothing was validated; return its name."""
    if not validated:
        about = {"epoch": module.epochs_done, "global_step": module.trainer.global_step}
        AtomicCheckpointIO().save_checkpoint(module.exported() | about, run.best)
    loaded = load_forecaster(run.best)
    past, future = sample[:, : loaded.in_length], sample[0, loaded.in_length :]
    forecasts = {
        name: mm_per_hour(model.predict(past)[0], loaded.scale)
        for name, model in ((loaded.name, loaded.model), ("persistence", Persistence(past.shape[1], len(future))))
    }
    now, observed = mm_per_hour(past[0, -1], loaded.scale), mm_per_hour(future, loaded.scale)
    figure = panel_figure(Kept(0, now, observed, forecasts))
    run.write(run.forecast, lambda path: save_figure(figure, path))
    return loaded.name
