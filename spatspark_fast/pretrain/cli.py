"""The command line of `pretrain`."""

from collections.abc import Sequence

from spatspark_fast.pretrain.config import PretrainConfig, validate
from spatspark_fast.training.command import Request, TrainingCommand, parse_training

__all__ = ["COMMAND", "parse_pretrain"]

COMMAND = TrainingCommand(
    name="pretrain",
    description="Pretrain a radar encoder by masked image modelling on packed, sparse convolutions. "
    "Without options: the preset `demo` on built-in synthetic radar, under two minutes on two CPU cores.",
    config=PretrainConfig,
    validate=validate,
    presets="spatspark_fast.pretrain.presets",
    # The same weights and the same steps; the engine may change.
    fixed=("model.", "data.input_length", "trainer.accumulate"),
    free=("model.backend",),
    foreign="give a checkpoint of pretrain",
)


def parse_pretrain(argv: Sequence[str]) -> Request[PretrainConfig]:
    """Read the command line of `pretrain`; see `parse_training`."""
    return parse_training(COMMAND, argv)
