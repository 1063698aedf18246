"""Finetune a forecaster on whole images: ``python -m spatspark_fast.finetune``.

Without options the preset `demo` runs on built-in synthetic radar. Heavy imports wait until the command line
is known to be right.
"""

import sys
from collections.abc import Sequence

from spatspark_fast.common.cli import run_command
from spatspark_fast.finetune.cli import COMMAND, asked_init, parse_finetune
from spatspark_fast.training.resume import begin, parse_resumed

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(finetune, argv)


def finetune(argv: Sequence[str]) -> None:
    """Read the command line, then train; raise `UserError` for whatever is wrong with the input."""
    with begin(COMMAND, argv) as (run, checkpoint):
        initial = None
        if checkpoint is not None:
            request = parse_resumed(COMMAND, argv, checkpoint)
        elif (init := asked_init(argv)) is not None:
            from spatspark_fast.finetune.initial import read_initial

            initial = read_initial(init)
            request = parse_finetune(argv, initial.demands)
        else:
            request = parse_finetune(argv)
        from spatspark_fast.finetune.run import train

        train(request.config, run, initial, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
