"""Put a pretraining run together, run it, and leave its results behind. Read it from top to bottom."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from spatspark_fast.common.options import differences, to_plain
from spatspark_fast.common.plots import reconstruction_figure, save_figure
from spatspark_fast.models.backbones import save_encoder
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.pretrain.build import Windows, build_masks, build_model, open_windows
from spatspark_fast.pretrain.clock import StepClock
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.pretrain.module import SparkPretraining
from spatspark_fast.pretrain.savings import counted_savings, describe_savings
from spatspark_fast.training.checkpoints import Checkpoints, read_checkpoint
from spatspark_fast.training.feed import open_stream
from spatspark_fast.training.recorder import Bar, Pictures, Recorder
from spatspark_fast.training.rundir import RunDirectory, trim_metrics
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.speed import describe_speed
from spatspark_fast.training.stream import BatchStream
from spatspark_fast.training.trainer import check_plan, known_warnings_off, make_trainer, plan_of, quieten

__all__ = ["train"]

SAMPLE_OF = 16  # windows among which the wettest is drawn
MEASURED_WINDOWS = 4


Draw = Callable[[SparkPretraining, str], None]


def train(config: PretrainConfig, run: RunDirectory, checkpoint: Path | None) -> None:
    """Train to the end of the plan, from ``checkpoint`` if there is one; check all input before writing."""
    quieten()
    console = Console()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    windows = open_windows(config.data, config.trainer.seed)
    masks = build_masks(config)
    sample = _sample(windows, config)
    torch.manual_seed(config.trainer.seed)
    spark = build_model(config)
    draw = _painter(sample, float(windows.scale), masks, run)
    clock = StepClock()
    recorder = Recorder(config.trainer.log_every, clock)
    callbacks = [
        clock,
        recorder,
        Bar(recorder, console),
        Pictures(draw, config.trainer.picture_every),
        Checkpoints(run, config.trainer.keep_every, config.trainer.log_every),
    ]
    trainer = make_trainer(config.trainer, run, callbacks, state)
    stream = open_stream(config, windows, trainer, _saying(console, trainer))
    plan = plan_of(config.trainer, config.optim, stream)
    check_plan(state, plan, checkpoint)
    if state is not None:  # Lightning restores a loader only within an epoch
        stream.load_state_dict(state)
    if trainer.is_global_zero:
        _open_run(config, run, state, checkpoint, str(trainer.strategy.root_device))
        _announce(console, config, stream, plan, state)
    module = SparkPretraining(config, spark, masks, plan)
    started = time.perf_counter()
    with known_warnings_off():
        trainer.fit(module, stream, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        draw(module, f"epoch {module.epochs_done:g}")
        scaling = spark.input_scaling
        run.write(run.encoder, lambda path: save_encoder(module.best_spark.encoder, path, input_scaling=scaling))
        run.add_to_session({"speed": recorder.speed.summary()})
        console.print(_result(module, recorder, time.perf_counter() - started), soft_wrap=True, highlight=False)
        console.print(describe_speed(recorder.speed), soft_wrap=True, highlight=False)
        if config.trainer.savings:
            frames = _some_windows(windows, config)
            precision = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
            device = trainer.strategy.root_device
            counted = counted_savings(spark, windows.image_size, config.mask.ratio, config.model.decode_ratio)
            run.add_to_session({"multiply_adds_G": counted})
            options = config.mask.ratio, precision, config.model.decode_ratio
            text = describe_savings(spark.to(device), frames.to(device), *options)
            console.print(text, soft_wrap=True, highlight=False)
        console.print(_files(run), soft_wrap=True, highlight=False)


def _saying(console: Console, trainer: L.Trainer) -> Callable[[str], None]:
    """Return the function that tells the user what takes time; one process of several speaks."""

    def say(text: str) -> None:
        if trainer.is_global_zero:
            console.print(text, soft_wrap=True, highlight=False)

    return say


def _open_run(
    config: PretrainConfig,
    run: RunDirectory,
    state: dict[str, Any] | None,
    checkpoint: Path | None,
    device: str,
) -> None:
    run.prepare()
    run.save_config(to_plain(config))
    run.save_versions(config.trainer.seed, device, None if checkpoint is None else str(checkpoint))
    trim_metrics(run.metrics, 0 if state is None else state["global_step"])


def _announce(
    console: Console, config: PretrainConfig, stream: BatchStream, plan: Plan, state: dict[str, Any] | None
) -> None:
    source = config.data.path or f"synthetic radar ({len(stream.windows)} windows)"
    lines = [
        f"Pretraining {config.model.encoder} on {source}: {plan.total_steps} steps of "
        f"{stream.batch_size} windows ({plan.epochs} epochs of {plan.batches_per_epoch} batches), "
        f"peak learning rate {plan.peak_lr:.2g}"
    ]
    if stream.batch_size < config.data.batch_size:
        lines.append(
            f"Note: there are {len(stream.windows)} windows, so a batch has {stream.batch_size} instead of "
            f"{config.data.batch_size}; the learning rate is scaled to that"
        )
    asked = config.optim.warmup_epochs * plan.steps_per_epoch
    if plan.warmup_steps < asked:
        lines.append(f"Note: warm-up is a quarter of this training, {plan.warmup_steps:g} steps instead of {asked:g}")
    if state is not None:
        lines.append(f"Going on after step {state['global_step']}")
        if changed := differences(to_plain(config), state["config"]):
            lines.append(f"Note: options changed since then: {', '.join(changed)}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _sample(windows: Windows, config: PretrainConfig) -> Tensor:
    """Return the wettest of the first windows, ``(1, T, H, W)``; reading it checks the file and the shape."""
    grid_shape(windows.image_size, config.model.patch)
    windows.set_epoch(0)
    frames = [torch.as_tensor(windows[i]["input"]) for i in range(min(len(windows), SAMPLE_OF))]
    return max(frames, key=lambda window: float(window.mean())).unsqueeze(0)


def _some_windows(windows: Windows, config: PretrainConfig) -> Tensor:
    """Return windows for the measurement, ``(B, T, H, W)``; few, to be quick on a CPU."""
    count = min(config.data.batch_size, len(windows), MEASURED_WINDOWS)
    return torch.stack([torch.as_tensor(windows[i]["input"]) for i in range(count)])


def _painter(sample: Tensor, scale: float, masks: MaskSampler, run: RunDirectory) -> Draw:
    """Return the function that draws the sample window, always under the same mask."""
    grid = masks.draw(sample, masks.ratio, torch.Generator().manual_seed(0))

    def draw(module: SparkPretraining, title: str) -> None:
        model = module.best_spark
        training = model.training
        device = next(model.parameters()).device
        model.eval()
        made = model.reconstruct(sample.to(device), grid.to(device)).float().cpu()
        model.train(training)
        figure = reconstruction_figure(sample[0], grid.active[0], made[0], scale, title)
        name = title.replace(" ", "-")
        run.write(run.pictures / f"{name}.png", lambda path: save_figure(figure, path))
        run.write(run.picture, lambda path: save_figure(figure, path))

    return draw


def _result(module: SparkPretraining, recorder: Recorder, seconds: float) -> str:
    return (
        f"Trained {module.plan.total_steps} steps ({module.epochs_done:.4g} epochs), {seconds:.0f} s; mean loss "
        f"{recorder.first_loss:.4f} in the first epoch, {recorder.epoch_loss:.4f} in the last"
    )


def _files(run: RunDirectory) -> str:
    return (
        f"Files in {run.root}: encoder.safetensors (timm's keys), checkpoints/last.ckpt, reconstruction.png, "
        "metrics.csv, config.yaml"
    )
