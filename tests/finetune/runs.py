"""Small, real finetuning runs for the tests, in this process."""

from pathlib import Path
from typing import Any

from spatspark_fast.finetune.__main__ import main

# 8 windows train, 2 validate; 4 batches an epoch, a second or two in all.
SMALL: dict[str, Any] = {
    "data.synthetic_windows": 10,
    "data.synthetic_size": 64,
    "data.input_length": 3,
    "data.output_length": 3,
    "data.validation_fraction": 0.2,
    "data.batch_size": 2,
    "model.encoder": "test_resnet",
    "model.decoder": "light",
    "model.decoder_width": 16,
    "optim.base_lr": 0.3,
    "optim.warmup_epochs": 1,
    "trainer.epochs": 3,
    "trainer.threads": 1,
    "trainer.log_every": 1,
    "trainer.patience": 0,
    "trainer.tensorboard": "false",
}

# What a pretraining checkpoint says by itself.
ARCHITECTURE = ("data.input_length", "model.encoder", "model.decoder", "model.decoder_width")


def arguments(out: Path, *more: str, init: Path | None = None, **changes: Any) -> list[str]:
    """Return a command line; in ``changes`` a double underscore stands for the dot of an option."""
    options = {name: value for name, value in SMALL.items() if init is None or name not in ARCHITECTURE}
    options |= {"data.cache": out.parent / "cache"}
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    begin = [] if init is None else [f"--init={init}"]
    return [f"--out={out}", *begin, *(f"--{name}={value}" for name, value in options.items()), *more]


def finetune(out: Path, *more: str, init: Path | None = None, **changes: Any) -> int:
    """Run the command in this process; return its exit code."""
    return main(arguments(out, *more, init=init, **changes))
