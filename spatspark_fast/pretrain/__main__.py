"""Pretrain an encoder by masked image modelling: ``python -m spatspark_fast.pretrain``.

Without options the preset `demo` runs on built-in synthetic radar. Heavy imports wait until the command line
is known to be right.
"""

import sys
from collections.abc import Sequence

from spatspark_fast.common.cli import run_command
from spatspark_fast.pretrain.cli import COMMAND, parse_pretrain
from spatspark_fast.training.resume import begin, parse_resumed

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(pretrain, argv)


def pretrain(argv: Sequence[str]) -> None:
    """Read the command line, then train; raise `UserError` for whatever is wrong with the input."""
    with begin(COMMAND, argv) as (run, checkpoint):
        request = parse_pretrain(argv) if checkpoint is None else parse_resumed(COMMAND, argv, checkpoint)
        from spatspark_fast.pretrain.run import train

        train(request.config, run, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
