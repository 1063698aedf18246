"""Put a pretraining run together, run it, and leave its results behind. Read it from top to bottom."""

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console
from torch import Tensor

from spatspark_fast.config import PretrainConfig, differences, to_plain
from spatspark_fast.errors import UserError
from spatspark_fast.masks import MaskSampler
from spatspark_fast.models.backbones import save_encoder
from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.plots import reconstruction_figure, save_figure
from spatspark_fast.runs import RunDirectory, trim_metrics
from spatspark_fast.training.build import Windows, build_masks, build_model, open_windows
from spatspark_fast.training.checkpoints import AtomicCheckpointIO, Checkpoints, read_checkpoint
from spatspark_fast.training.module import SparkPretraining
from spatspark_fast.training.record import Bar, MetricsCsv, Pictures, Recorder
from spatspark_fast.training.savings import describe_savings
from spatspark_fast.training.schedules import Plan, make_plan
from spatspark_fast.training.stream import BatchStream

__all__ = ["train"]

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}
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
    recorder = Recorder(config.trainer.log_every)
    callbacks = [
        recorder,
        Bar(recorder, console),
        Pictures(draw, config.trainer.picture_every),
        Checkpoints(run, config.trainer.keep_every, config.trainer.log_every),
    ]
    trainer = _trainer(config, run, callbacks, state)
    stream = _stream(config, windows, trainer)
    plan = _plan(config, stream)
    _check_plan(state, plan, checkpoint)
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
        run.write(run.encoder, lambda path: save_encoder(module.best_spark.encoder, path))
        console.print(_result(module, recorder, time.perf_counter() - started), soft_wrap=True, highlight=False)
        if config.trainer.savings:
            frames = _some_windows(windows, config)
            precision = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
            device = trainer.strategy.root_device
            text = describe_savings(spark.to(device), frames.to(device), config.mask.ratio, precision)
            console.print(text, soft_wrap=True, highlight=False)
        console.print(_files(run), soft_wrap=True, highlight=False)


def quieten() -> None:
    """Silence what Lightning says on its own behalf: devices found, tips, advertisements. Warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def known_warnings_off() -> Iterator[None]:
    """Ignore warnings that Lightning causes by its own code and that nobody here can heed."""
    with warnings.catch_warnings():
        # Lightning 2.6 flattens its loaders by a class that torch 2.10 and later call deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        yield


def _trainer(
    config: PretrainConfig, run: RunDirectory, callbacks: list[L.Callback], state: dict[str, Any] | None
) -> L.Trainer:
    options = config.trainer
    loggers: list[Logger] = [MetricsCsv(run.metrics)]
    if options.tensorboard:
        purge = {} if state is None else {"purge_step": state["global_step"] + 1}
        loggers.append(TensorBoardLogger(run.root, name="", version="tensorboard", **purge))
    try:
        return L.Trainer(
            accelerator=options.accelerator,
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
        raise UserError(
            f"--trainer.accelerator {options.accelerator} with {options.devices} devices: {error}"
        ) from error


def _stream(config: PretrainConfig, windows: Windows, trainer: L.Trainer) -> BatchStream:
    return BatchStream(
        windows,
        config.data.batch_size,
        seed=config.trainer.seed,
        num_workers=config.data.num_workers,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )


def _plan(config: PretrainConfig, stream: BatchStream) -> Plan:
    return make_plan(
        batches_per_epoch=stream.batches_per_epoch,
        epochs=config.trainer.epochs,
        max_steps=config.trainer.max_steps,
        accumulate=config.trainer.accumulate,
        warmup_epochs=config.optim.warmup_epochs,
        windows_per_batch=stream.batch_size * stream.world_size,
        base_lr=config.optim.base_lr,
        final_lr=config.optim.final_lr,
        weight_decay=config.optim.weight_decay,
        weight_decay_end=config.optim.weight_decay_end,
    )


def _check_plan(state: dict[str, Any] | None, plan: Plan, checkpoint: Path | None) -> None:
    """Refuse a checkpoint whose place in the data means another one now, or that is at the end already."""
    if state is None:
        return
    if state["batches_per_epoch"] != plan.batches_per_epoch:
        raise UserError(
            f"{checkpoint} is of a run with {state['batches_per_epoch']} batches an epoch, now there are "
            f"{plan.batches_per_epoch}: the data, --data.batch_size or the number of devices changed; "
            "give the same again, or start a new run"
        )
    if state["global_step"] >= plan.total_steps:
        raise UserError(
            f"{checkpoint} is at step {state['global_step']} of {plan.total_steps}, so it is complete: "
            "give more --trainer.epochs (or --trainer.max_steps) to go on"
        )


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
