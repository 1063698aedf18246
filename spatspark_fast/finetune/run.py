"""Put a finetuning run together, run it, and leave its results behind. Read it from top to bottom."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import differences, to_plain
from spatspark_fast.common.plots import save_figure
from spatspark_fast.common.units import mm_per_hour
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.evaluate.pictures import panel_figure
from spatspark_fast.evaluate.scoring import Kept
from spatspark_fast.finetune.config import FinetuneConfig, forecaster_name, forecaster_options
from spatspark_fast.finetune.initial import Initial
from spatspark_fast.finetune.module import ForecastTraining, begin_norms
from spatspark_fast.finetune.validation import THRESHOLDS, Validation
from spatspark_fast.finetune.windows import ForecastWindows, Split, hold_out
from spatspark_fast.models.forecaster import Forecaster, Persistence
from spatspark_fast.models.registry import build_forecaster, load_forecaster
from spatspark_fast.models.spatspark import SpatSpark
from spatspark_fast.training.checkpoints import AtomicCheckpointIO, Checkpoints, read_checkpoint
from spatspark_fast.training.recorder import Bar, Recorder
from spatspark_fast.training.rundir import RunDirectory, trim_metrics
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.stream import BatchStream, batches_of
from spatspark_fast.training.trainer import check_plan, known_warnings_off, make_trainer, plan_of, quieten

__all__ = ["train"]

COLUMNS = (
    *("step", "epoch", "loss", "lr", "weight_decay", "grad_norm", "images_per_s", "data_wait_share"),
    *("validation_mse", *(f"validation_csi_{threshold:g}" for threshold in THRESHOLDS)),
)
SYNTHETIC_SEED = 0  # the built-in data set is always the same; the seed of a run does not change its data
OUTPUT_LENGTH = 12  # frames of synthetic radar to forecast
FIRST = 4  # windows that set the norms before the first step
SAMPLE_OF = 16  # windows among which the wettest is drawn


def train(config: FinetuneConfig, run: RunDirectory, initial: Initial | None, checkpoint: Path | None) -> None:
    """Train to the end of the plan, from ``checkpoint`` if there is one; check all input before writing."""
    quieten()
    console = Console()
    options = config.trainer
    if options.threads:
        torch.set_num_threads(options.threads)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    training, held, split = open_windows(config)
    sample = _sample(held or training)
    torch.manual_seed(options.seed)
    model, notes = _model(config, training, initial)
    model.check(sample[:, : model.in_length])
    recorder = Recorder(options.log_every)
    validation = None if held is None else _validation(config, held, run, console)
    callbacks = [recorder, *([validation] if validation else []), Bar(recorder, console)]
    callbacks.append(Checkpoints(run, options.keep_every, options.log_every))
    trainer = make_trainer(options, run, callbacks, state, COLUMNS)
    stream = batches_of(training, config, trainer)
    plan = plan_of(options, config.optim, stream)
    check_plan(state, plan, checkpoint)
    _check_patience(state, validation, checkpoint)
    if state is not None:  # Lightning restores a loader only within an epoch
        stream.load_state_dict(state)
    if trainer.is_global_zero:
        device = str(trainer.strategy.root_device)
        run.prepare()
        run.save_config(to_plain(config))
        run.save_versions(options.seed, device, None if checkpoint is None else str(checkpoint))
        trim_metrics(run.metrics, 0 if state is None else state["global_step"])
        _say(console, [*_announce(config, stream, plan, split), *notes, *_went_on(config, state)])
    if state is None:
        training.set_epoch(0)
        first = torch.stack([training[i]["input"] for i in range(min(len(training), stream.batch_size, FIRST))])
        begin_norms(model.train(), first[:, : model.in_length])
    module = ForecastTraining(config, model, training.scale, plan)
    started = time.perf_counter()
    with known_warnings_off():
        trainer.fit(module, stream, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        best = _finish(module, run, sample, validation is not None)
        seconds = time.perf_counter() - started
        _say(console, [*_result(module, recorder, validation, seconds), _files(run, best)])


def open_windows(config: FinetuneConfig) -> tuple[ForecastWindows, ForecastWindows | None, Split]:
    """Open the windows for training and, unless there are none, those held out for validation."""
    data = config.data
    plain = _dataset(config, augment=False)
    if plain.output_length < 1:
        raise UserError(
            f"{data.path}: windows have {plain.input_length} frames and none to forecast; "
            "give a smaller --data.input_length"
        )
    split = hold_out(plain, data.validation_fraction)
    training = ForecastWindows(_dataset(config, augment=True), split.train)
    return training, ForecastWindows(plain, split.validation) if split.validation else None, split


def _dataset(config: FinetuneConfig, augment: bool) -> NowcastDataset | SyntheticRadar:
    data = config.data
    if data.path is None:
        if data.crop is not None or data.flip or data.quarter_turns:
            raise UserError("--data.crop, --data.flip and --data.quarter_turns need a file: give --data.path")
        lengths = data.input_length, data.output_length or OUTPUT_LENGTH
        return SyntheticRadar(data.synthetic_windows, *lengths, image_size=data.synthetic_size, seed=SYNTHETIC_SEED)
    changes = {"crop": data.crop, "flip": data.flip, "quarter_turns": data.quarter_turns} if augment else {}
    return NowcastDataset(
        data.path,
        data.split,
        data.input_length,
        data.output_length,
        seed=config.trainer.seed,
        include_valid=True,
        **changes,
    )


def _model(
    config: FinetuneConfig, windows: ForecastWindows, initial: Initial | None
) -> tuple[Forecaster, Sequence[str]]:
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


def _validation(config: FinetuneConfig, held: ForecastWindows, run: RunDirectory, console: Console) -> Validation:
    options = config.trainer
    return Validation(
        held,
        run.best,
        console,
        every=options.validate_every,
        score=options.score,
        patience=options.patience,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
    )


def _check_patience(state: dict[str, Any] | None, validation: Validation | None, checkpoint: Path | None) -> None:
    """Refuse to go on with a run that had stopped early, unless it has more patience now."""
    if state is None or validation is None:
        return
    saved = state["callbacks"].get(validation.state_key)
    if saved is not None:
        validation.load_state_dict(saved)
    if validation.exhausted:
        raise UserError(
            f"{checkpoint} stopped early after {validation.since_best} validations without a better score: give more "
            "--trainer.patience to go on (0 never stops)"
        )


def _sample(windows: ForecastWindows) -> Tensor:
    """Return the wettest of the first windows, ``(1, T, H, W)``; reading it checks the file."""
    windows.set_epoch(0)
    frames = [windows[i]["input"] for i in range(min(len(windows), SAMPLE_OF))]
    return max(frames, key=lambda window: float(window.nan_to_num(nan=0.0).mean())).unsqueeze(0)


def _announce(config: FinetuneConfig, stream: BatchStream, plan: Plan, split: Split) -> list[str]:
    data = config.data
    lines = [
        f"Finetuning {forecaster_name(config)} on {data.path or 'synthetic radar'}: {plan.total_steps} steps of "
        f"{stream.batch_size} windows ({plan.epochs} epochs of {plan.batches_per_epoch} batches), "
        f"peak learning rate {plan.peak_lr:.2g}",
        f"{len(split.train)} windows train, the newest {len(split.validation)} validate; {split.dropped} that share "
        "frames with those are left out"
        if split.validation
        else f"{len(split.train)} windows train; none is held out, so the last checkpoint counts as the best",
    ]
    if not split.timed:
        lines.append("Note: the windows have no readable times, so their order in the file counts as order in time")
    if stream.batch_size < data.batch_size:
        lines.append(
            f"Note: there are {len(stream.windows)} windows, so a batch has {stream.batch_size} instead of "
            f"{data.batch_size}; the learning rate is scaled to that"
        )
    if config.init is None and config.model.kind != "smaat":
        lines.append("Weights are random; --init CKPT takes those of a pretraining")
    return lines


def _went_on(config: FinetuneConfig, state: dict[str, Any] | None) -> list[str]:
    if state is None:
        return []
    changed = differences(to_plain(config), state["config"])
    note = [f"Note: options changed since then: {', '.join(changed)}"] if changed else []
    return [f"Going on after step {state['global_step']}", *note]


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


def _result(module: ForecastTraining, recorder: Recorder, validation: Validation | None, seconds: float) -> list[str]:
    lines = [
        f"Trained {module.trainer.global_step} steps ({module.epochs_done:.4g} epochs), {seconds:.0f} s; mean loss "
        f"{recorder.first_loss:.4f} (mm/5min)^2 in the first epoch, {recorder.epoch_loss:.4f} in the last"
    ]
    if validation is not None:
        lines.append(f"Best checkpoint: epoch {validation.best_epoch:.4g}, {validation.describe(validation.best)}")
    return lines


def _files(run: RunDirectory, name: str) -> str:
    return (
        f"Files in {run.root}: checkpoints/best.ckpt ({name}), checkpoints/last.ckpt, forecast.png, metrics.csv, "
        "config.yaml"
    )


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
