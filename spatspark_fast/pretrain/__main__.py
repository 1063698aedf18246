"""Pretrain an encoder by masked image modelling: ``python -m spatspark_fast.pretrain``.

Without options the preset `demo` runs on built-in synthetic radar. Heavy imports wait until the command line
is known to be right.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatspark_fast.common.cli import parse_pretrain, program, run_command
from spatspark_fast.pretrain.config import to_plain
from spatspark_fast.training.resume import check_same, checkpoint_of, is_first_process, out_of
from spatspark_fast.training.rundir import RunDirectory

__all__ = ["main"]

# A checkpoint goes on only with the same weights and the same steps; the engine and all else may change.
FIXED = ("model.", "data.input_length", "trainer.accumulate")
FREE = ("model.backend",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: pretrain(sys.argv[1:] if argv is None else argv))


def pretrain(argv: Sequence[str]) -> None:
    """Read the command line, then train; raise `UserError` for whatever is wrong with the input."""
    request = parse_pretrain(argv, prog=program("pretrain"))
    run = RunDirectory(out_of(request))
    checkpoint = checkpoint_of(request, run)
    if is_first_process():
        run.check(resume=request.resume is not None)
    if checkpoint is not None:
        theirs = _options_of(checkpoint)
        request = parse_pretrain(argv, base=theirs, prog=program("pretrain"))
        check_same(to_plain(request.config), theirs, checkpoint, FIXED, FREE)
    from spatspark_fast.pretrain.run import train

    train(request.config, run, checkpoint)


def _options_of(checkpoint: Path) -> dict[str, Any]:
    """Return the options with which a checkpoint was made."""
    from spatspark_fast.training.checkpoints import read_checkpoint

    return read_checkpoint(checkpoint)["config"]


if __name__ == "__main__":
    sys.exit(main())
