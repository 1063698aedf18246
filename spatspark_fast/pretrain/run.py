"""Put a pretraining run together, run it, and leave its results behind. Read it from top to bottom."""

import time
from pathlib import Path

import torch

from spatspark_fast.common.options import notes_on_idle, to_plain
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.models.backbones import save_encoder
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain.build import build_masks, build_model, check_masks
from spatspark_fast.pretrain.clock import PARTS, WHOLE, StepClock
from spatspark_fast.pretrain.config import PretrainConfig, idle_options
from spatspark_fast.pretrain.decoding import describe_decoding
from spatspark_fast.pretrain.module import SparkPretraining
from spatspark_fast.pretrain.pictures import Pictures
from spatspark_fast.pretrain.savings import counted_savings, describe_savings
from spatspark_fast.training.bar import Bar
from spatspark_fast.training.checkpoints import Checkpoints, read_checkpoint
from spatspark_fast.training.cuda_graphs import choose_graphs
from spatspark_fast.training.feed import open_store, open_stream
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
from spatspark_fast.training.trainer import (
    complete,
    make_trainer,
    open_run,
    plan_of,
    prepare_process,
    take_up,
)
from spatspark_fast.training.windows import open_windows, stack_of, wettest

__all__ = ["COLUMNS", "train"]

COLUMNS = (
    *("step", "epoch", "loss", "lr", "weight_decay", "mask_ratio", "grad_norm", "images_per_s"),
    *("data_wait_share", "encoder_share", "decoder_share", "optimiser_share", "step_share"),
)
MEASURED_WINDOWS = 4  # few, to be quick on a CPU


def train(config: PretrainConfig, run: RunDirectory, checkpoint: Path | None) -> None:
    """Train to the end of the plan, from ``checkpoint`` if there is one; check all input before writing."""
    console, options = TrainingConsole(), config.trainer
    prepare_process(options.threads)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    windows = open_windows(config.data, output_length=0, seed=options.seed)
    masks = build_masks(config)
    check_masks(config, windows.image_size)
    sample = wettest(windows, range(len(windows)))
    torch.manual_seed(options.seed)
    spark = build_model(config)
    pictures = Pictures(run, sample, windows.scale, masks, options.picture_every)
    clock = StepClock()
    recorder = Recorder(options.log_every, clock)
    callbacks = [clock, recorder, Bar(recorder, console), pictures]
    callbacks.append(Checkpoints(run, options.keep_every, options.log_every))
    trainer = make_trainer(options, run, callbacks, state, COLUMNS)
    device = trainer.strategy.root_device
    say = speaker(console, trainer)
    store = open_store(config.data, windows, say)
    stream = open_stream(config.data, windows, store, trainer, options.seed)
    plan = plan_of(options, config.optim, stream)
    data = mark_of(windows, stream.numbers, store)
    if state is not None:
        check_state(state, plan, trainer, checkpoint)
    at_end = take_up(state, plan, stream, data, checkpoint)
    if state is not None and at_end and (words := complete(run, state, checkpoint, trainer)) is not None:
        say(words)
        return
    spark.check_visible(stream.batch_size * masks.least_visible(windows.image_size))
    if trainer.is_global_zero:
        open_run(run, to_plain(config), device, state, checkpoint)
        source = config.data.path or f"synthetic radar ({len(windows)} windows)"
        what = f"Pretraining {config.model.encoder} on {source}"
        notes = start_notes(what, plan, stream, config.data.batch_size, config.optim)
        decoding = describe_decoding(config, spark, windows.image_size, plan)
        idle = notes_on_idle(config, idle_options(config))
        for note in (*notes, *idle, *decoding, *resume_notes(to_plain(config), state)):
            say(note)
    module = SparkPretraining(config, spark, masks, plan)
    module.graphs, module.say = choose_graphs(options.graph, device, trainer.world_size, say), say
    module.data = data
    started = time.perf_counter()
    fit(trainer, module, stream, checkpoint)
    if trainer.is_global_zero:
        pictures.draw(module)
        scaling = spark.input_scaling
        run.write(run.encoder, lambda path: save_encoder(module.kept.encoder, path, input_scaling=scaling))
        say(describe_training(module, recorder, time.perf_counter() - started))
        if recorder.speed.rows:
            run.add_to_session({"speed": recorder.speed.summary()})
            say(describe_speed(recorder.speed, {**PARTS, WHOLE: "whole training steps"}))
        if options.savings:
            say(_savings(config, spark.to(device), windows, run))
        run.finish(trainer.global_step, run.encoder, run.picture)
        say(
            f"Files in {run.root}: encoder.safetensors (timm's keys), checkpoints/last.ckpt, reconstruction.png, "
            "metrics.csv, config.yaml"
        )


def _savings(config: PretrainConfig, spark: SparK, windows: WholeWindows, run: RunDirectory) -> str:
    """Count and measure what being sparse saves; write the counts down, and return all in words."""
    ratio, decode_ratio = config.mask.ratio, config.model.decode_ratio
    run.add_to_session({"multiply_adds_G": counted_savings(spark, windows.image_size, ratio, decode_ratio)})
    count = min(config.data.batch_size, len(windows), MEASURED_WINDOWS)
    frames = stack_of(windows, range(count)).to(next(spark.parameters()).device)
    precision = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    return describe_savings(spark, frames, ratio, precision, decode_ratio)
