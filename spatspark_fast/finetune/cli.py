"""The command line of `finetune`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from spatspark_fast.common.cli import asked
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import to_plain
from spatspark_fast.finetune.config import FinetuneConfig, validate
from spatspark_fast.training.command import Request, TrainingCommand, parse_training

__all__ = ["COMMAND", "asked_init", "parse_finetune"]


def _add_init(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--init",
        help="weights to start from: a checkpoint of pretrain or of finetune, or an encoder.safetensors; "
        '"none" (the default) trains from scratch. Its encoder, decoder and input length become those of the model',
    )


COMMAND = TrainingCommand(
    name="finetune",
    description="Finetune a forecaster of rain on whole images, from pretrained or from random weights. "
    "Without options: the preset `demo` on built-in synthetic radar, about a minute on two CPU cores.",
    config=FinetuneConfig,
    validate=validate,
    presets="spatspark_fast.finetune.presets",
    prefix="finetune-",
    own=_add_init,
    # The same weights, the same windows and the same steps.
    fixed=(
        *("model.", "data.input_length", "data.output_length", "data.validation_fraction"),
        "trainer.accumulate",
    ),
    foreign="start from it by --init, not by --resume",
)


def parse_finetune(argv: Sequence[str], demands: Mapping[str, Any] | None = None) -> Request[FinetuneConfig]:
    """Read the command line of `finetune`; see `parse_training`.

    ``demands`` maps options to the values that ``--init`` needs; another value from elsewhere raises `UserError`.
    """
    request = parse_training(COMMAND, argv, demands=demands)
    plain = to_plain(request.config)
    for option, value in (demands or {}).items():
        group, name = option.split(".")
        if plain[group][name] != value:
            raise UserError(
                f"--{option} is {plain[group][name]}, but --init {request.config.init} was trained with {value}: "
                "leave the option out"
            )
    return request


def asked_init(argv: Sequence[str]) -> Path | None:
    """Return the file that ``--init`` names on the command line or in the config file, if any."""
    init = asked(argv, "init")
    return None if init in (None, "none") else Path(init)
