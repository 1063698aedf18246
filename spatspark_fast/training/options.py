"""Options that every training has, as dataclasses; the options of each command derive from them.

Only plain values live here (numbers, strings, booleans, lists, None), so that a configuration goes unchanged
into YAML, into a checkpoint that loads with ``weights_only=True``, and back. No torch is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from spatspark_fast.common.options import check_least, check_most, need
from spatspark_fast.models.choices import DecoderKind, DecoderNorm, InputScaling
from spatspark_fast.models.geometry import check_patch

__all__ = [
    "MANY",
    "Compile",
    "DataOptions",
    "Device",
    "Graph",
    "ModelOptions",
    "OptimOptions",
    "Optimiser",
    "Precision",
    "Resident",
    "TrainerOptions",
    "TrainingConfig",
    "check_crop",
    "check_training",
    "idle_shared",
    "notes_on_old",
    "under_new_names",
]

Resident = Literal["auto", "device", "host", "off"]
Optimiser = Literal["lamb", "adamw"]
Precision = Literal["fp32", "bf16"]
Compile = Literal["off", "default", "max-autotune"]
Graph = Literal["auto", "on", "off"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass
class DataOptions:
    """Say which windows are read, and how.

    Args:
        path: HDF5 file in the NL-50 layout; without it the built-in synthetic radar serves
        split: group of the file to train on, "train" or "test"
        input_length: frames that the model sees, in time steps of 5 minutes; they are the channels of one image
        crop: side in pixels of a random square crop for training; without it the whole image
        flip: flip a window at random, left-right and up-down
        quarter_turns: turn a window at random by a multiple of 90 degrees
        batch_size: windows in one forward pass on one device; never more than there are
        resident: where windows stay in training: "device" (memory of the GPU), "host" (memory of the machine), "auto"
            (the GPU if they take at most a third of its free memory, else the machine), "off" (read one by one)
        cache: folder for the uncompressed copy of the file; by default spatspark-fast in the user's cache folder
        num_workers: processes on each device that read, or unpack the file once if it is resident; 0 starts none
        synthetic_windows: number of windows of the synthetic radar
        synthetic_size: side in pixels (1 km each) of a synthetic image
    """

    path: str | None = None
    split: str = "train"
    input_length: int = 12
    crop: int | None = None
    flip: bool = False
    quarter_turns: bool = False
    batch_size: int = 128
    resident: Resident = "auto"
    cache: str | None = None
    num_workers: int = 0
    synthetic_windows: int = 64
    synthetic_size: int = 288


@dataclass
class ModelOptions:
    """Say what is trained.

    Args:
        encoder: name of a timm backbone, for example resnet18, resnet50 or convnext_tiny
        patch: side in pixels of the square patches that pretraining hides; images are multiples of it
        levels: feature maps used, at strides 4, 8, 16, 32; fewer than 4 allow patches of 16 or 8 pixels
        decoder: "unet" (the published one) or "light" (one block and a 1x1 convolution)
        decoder_width: channels of the decoder's first block
        decoder_norm: norms of the U-Net's blocks: "batch" (as published), or independent of the batch: "group", "layer"
        input_scaling: what the encoder sees: "log", log(1 + R) with R in mm/h, or "none", data values as published
    """

    encoder: str = "resnet18"
    patch: int = 32
    levels: int = 4
    decoder: DecoderKind = "unet"
    decoder_width: int = 768
    decoder_norm: DecoderNorm = "batch"
    input_scaling: InputScaling = "log"


@dataclass
class OptimOptions:
    """Say how weights move.

    Args:
        name: "lamb" or "adamw"
        base_lr: peak learning rate for 256 windows per optimiser step; scaled in proportion to the real number
        betas: decay rates of the first and the second moment
        clip: largest norm of the whole gradient; 0 switches clipping off
        weight_decay: weight decay at the start; 1-D parameters and mask tokens have none
        weight_decay_end: weight decay at the end, reached along a cosine
        warmup_epochs: epochs of linear warm-up; at most a quarter of training is used for it
        final_lr: learning rate at the end as a share of its peak, reached along a cosine
        ema: decay of the exponential moving average of the weights, for example 0.9999; 0 keeps none
    """

    name: Optimiser = "lamb"
    base_lr: float = 2e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 5.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2
    warmup_epochs: float = 40.0
    final_lr: float = 0.001
    ema: float = 0.0


@dataclass
class TrainerOptions:
    """Say how long, where and with what record.

    Args:
        epochs: passes over the training windows
        max_steps: stop after so many optimiser steps, if that comes first; the schedules end there too
        seed: seed of all that is random: weights, data order, augmentation, masks and drop-path
        precision: "fp32", or "bf16" (autocast; weights stay in float32)
        compile: torch.compile of the model: "off", or its mode
        graph: whole steps as CUDA graphs: "on", "off", or "auto" (on one GPU); where that fails they run as without
        accumulate: forward passes for one optimiser step
        device: where to train: "auto" (on a GPU if there is one), "cpu" or "cuda"
        devices: number of devices, or "auto" for all (one process on a CPU)
        threads: threads of one process on a CPU; 0 leaves torch's own choice
        log_every: optimiser steps between two rows of metrics.csv
        keep_every: epochs between two checkpoints that are kept for good; 0 keeps none
        tensorboard: write TensorBoard logs too
    """

    epochs: int = 1600
    max_steps: int | None = None
    seed: int = 0
    precision: Precision = "fp32"
    compile: Compile = "off"
    graph: Graph = "auto"
    accumulate: int = 1
    device: Device = "auto"
    devices: str = "auto"
    threads: int = 0
    log_every: int = 10
    keep_every: int = 0
    tensorboard: bool = True


class TrainingConfig(Protocol):
    """Say which groups of options every training has."""

    @property
    def data(self) -> DataOptions:
        """Say which windows are read."""
        ...

    @property
    def model(self) -> ModelOptions:
        """Say what is trained."""
        ...

    @property
    def optim(self) -> OptimOptions:
        """Say how weights move."""
        ...

    @property
    def trainer(self) -> TrainerOptions:
        """Say how long, where and with what record."""
        ...


AT_LEAST_ONE = (
    *("data.input_length", "data.batch_size", "data.crop", "data.synthetic_windows", "data.synthetic_size"),
    *("model.patch", "model.levels", "model.decoder_width"),
    *("trainer.epochs", "trainer.max_steps", "trainer.accumulate", "trainer.log_every"),
)
AT_LEAST_ZERO = (
    *("data.num_workers", "optim.clip", "optim.weight_decay", "optim.weight_decay_end", "optim.warmup_epochs"),
    *("trainer.seed", "trainer.threads", "trainer.keep_every"),
)
# What no machine and no training needs more of: beyond, a slip of the keyboard would take all memory, or a year.
MANY = 1_000_000_000
AT_MOST = {
    **dict.fromkeys(("data.synthetic_size", "data.crop", "model.patch"), 16384),
    **dict.fromkeys(("data.synthetic_windows", "data.batch_size", "trainer.epochs", "trainer.max_steps"), MANY),
    **dict.fromkeys(("trainer.accumulate", "trainer.log_every", "trainer.keep_every", "optim.warmup_epochs"), MANY),
    **dict.fromkeys(("optim.base_lr", "optim.weight_decay", "optim.weight_decay_end"), 1e6),
    **{"data.input_length": 4096, "data.num_workers": 512, "trainer.threads": 1024, "model.decoder_width": 16384},
    "trainer.seed": 2**63 - 1,
}
MOST_PIXELS = 1 << 30  # of a made-up window: 4 GiB


def check_training(config: TrainingConfig) -> None:
    """Check the shared options that need no file; raise `UserError` naming the option and the remedy."""
    check_least(config, AT_LEAST_ONE, 1)
    check_least(config, AT_LEAST_ZERO, 0)
    check_most(config, AT_MOST)
    optim, devices = config.optim, config.trainer.devices
    positive = 0 < optim.base_lr < math.inf
    need(positive, "optim.base_lr", optim.base_lr, "give a positive number, for example 2e-4")
    need(0 <= optim.final_lr <= 1, "optim.final_lr", optim.final_lr, "give a share of the peak, 0 to 1")
    decay = "give a decay of at least 0 and below 1, for example 0.9999"
    need(0 <= optim.ema < 1, "optim.ema", optim.ema, decay)
    betas = optim.betas
    need(len(betas) == 2 and all(0 <= b < 1 for b in betas), "optim.betas", betas, "give two numbers in [0, 1)")
    number = devices.isdecimal() and devices.isascii() and len(devices) < 5 and int(devices) >= 1
    need(devices == "auto" or number, "trainer.devices", devices, 'give a number of at least 1, or "auto"')
    check_patch(config.model.patch, config.model.levels)
    data = config.data
    frames = data.input_length + (getattr(data, "output_length", None) or 0)
    fits = data.path is not None or frames * data.synthetic_size**2 <= MOST_PIXELS
    need(fits, "data.synthetic_size", data.synthetic_size, f"a window of {frames} such frames fits no memory")


def check_crop(config: TrainingConfig) -> None:
    """Raise `UserError` unless a crop is whole patches."""
    crop, patch = config.data.crop, config.model.patch
    need(crop is None or crop % patch == 0, "data.crop", crop, f"give a multiple of --model.patch {patch}")


def idle_shared(config: TrainingConfig) -> dict[str, str]:
    """Return the options that both trainings have and that play no part in a configuration, and why."""
    idle = {}
    if config.model.decoder == "light":
        idle["model.decoder_norm"] = "the light decoder has a norm of its own"
    if config.data.path is not None:
        idle |= dict.fromkeys(("data.synthetic_windows", "data.synthetic_size"), "windows come from --data.path")
    return idle


GRAPHS_NOW = {"compile": "default", "graph": "auto"}


def under_new_names(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run or file, nested dicts, by today's names and values.

    ``trainer.accelerator`` became ``trainer.device``, ``trainer.compile reduce-overhead`` is `GRAPHS_NOW`, and
    ``model.dense_decoder_blocks`` is no more.
    """
    found = dict(plain)
    trainer, model = plain.get("trainer"), plain.get("model")
    if isinstance(trainer, Mapping):
        options = dict(trainer)
        if "accelerator" in options:
            accelerator = options.pop("accelerator")
            options["device"] = "cuda" if accelerator == "gpu" else accelerator
        if options.get("compile") == "reduce-overhead":
            options |= GRAPHS_NOW
        found["trainer"] = options
    if isinstance(model, Mapping):
        found["model"] = {name: value for name, value in model.items() if name != "dense_decoder_blocks"}
    return found


def notes_on_old(plain: Mapping[str, Any]) -> list[str]:
    """Return what a user has to know whose run was begun with options that mean something else today."""
    trainer, model = plain.get("trainer") or {}, plain.get("model") or {}
    notes = []
    if trainer.get("compile") == "reduce-overhead":
        notes.append("--trainer.compile reduce-overhead is now --trainer.compile default and --trainer.graph auto")
    if "dense_decoder_blocks" in model and model.get("decoder") != "light" and model.get("decode_ratio", 1) < 1:
        notes.append("sparse decoding now reconstructs a region instead of single patches, see docs/decoding.md")
    return notes
