"""Small, real pretraining runs for the tests, in this process or in one of their own."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from spatspark_fast.pretrain.__main__ import main

# 4 batches of 2 windows an epoch, a second or two in all.
SMALL: dict[str, Any] = {
    "data.synthetic_windows": 8,
    "data.synthetic_size": 64,
    "data.input_length": 3,
    "data.batch_size": 2,
    "model.encoder": "test_resnet",
    "model.decoder": "light",
    "model.decoder_width": 16,
    "mask.ratio": 0.5,
    "optim.name": "lamb",
    "optim.base_lr": 0.1,
    "optim.warmup_epochs": 1,
    "trainer.epochs": 3,
    "trainer.threads": 1,
    "trainer.log_every": 1,
    "trainer.tensorboard": "false",
    "trainer.savings": "false",
}

TIMES = ("images_per_s", "data_wait_share", "encoder_share", "decoder_share", "optimiser_share")


def arguments(out: Path, *more: str, **changes: Any) -> list[str]:
    """Return a command line; in ``changes`` a double underscore stands for the dot of an option."""
    options = (
        SMALL
        | {"data.cache": out.parent / "cache"}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return [f"--out={out}", *(f"--{name}={value}" for name, value in options.items()), *more]


def pretrain(out: Path, *more: str, **changes: Any) -> int:
    """Run the command in this process; return its exit code."""
    return main(arguments(out, *more, **changes))


def start(argv: list[str], strict: bool = True, command: str = "pretrain") -> subprocess.Popen[str]:
    """Start a command in a process of its own; ``strict`` turns warnings into errors."""
    return subprocess.Popen(
        [sys.executable, *(["-W", "error"] if strict else []), "-m", f"spatspark_fast.{command}", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def rows(out: Path, times: bool = True) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, without the columns that depend on the clock if so asked."""
    with (out / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{name: row[name] for name in row if times or name not in TIMES} for row in found]


def checkpoint(out: Path, name: str = "last") -> dict[str, Any]:
    """Load a checkpoint, tensors and plain values only."""
    return torch.load(out / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Compare nested containers, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_training(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tell whether two checkpoints hold the same weights, optimiser and place in the data, bit by bit."""
    keys = ("state_dict", "optimizer_states", "position", "global_step")
    return all(same(a[key], b[key]) for key in keys)
