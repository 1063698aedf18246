"""Finetune a forecaster on whole images: ``python -m spatspark_fast.finetune``.

Without options the preset `demo` runs on built-in synthetic radar. Heavy imports wait until the command line
is known to be right.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatspark_fast.common.cli import program, run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.finetune.cli import FinetuneRequest, asked_init, parse_finetune
from spatspark_fast.finetune.config import to_plain
from spatspark_fast.training.resume import check_same, checkpoint_of, is_first_process, out_of
from spatspark_fast.training.rundir import RunDirectory

__all__ = ["main"]

# A checkpoint goes on only with the same weights and the same steps; all else may change.
FIXED = (
    *("model.", "data.input_length", "data.output_length", "data.validation_fraction"),
    "trainer.accumulate",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: finetune(sys.argv[1:] if argv is None else argv))


def finetune(argv: Sequence[str]) -> None:
    """Read the command line, then train; raise `UserError` for whatever is wrong with the input."""
    request = parse_finetune([word for word in argv if not word.startswith("--print_config")], prog=program("finetune"))
    run = RunDirectory(out_of(request, prefix="finetune-"))
    checkpoint = checkpoint_of(request, run)
    if is_first_process():
        run.check(resume=request.resume is not None)
    initial = None
    if checkpoint is not None:
        request = _resumed(argv, checkpoint)
    elif (init := asked_init(argv)) is not None:
        from spatspark_fast.finetune.initial import read_initial

        initial = read_initial(init)
        request = parse_finetune(argv, demands=initial.demands, prog=program("finetune"))
    else:
        request = parse_finetune(argv, prog=program("finetune"))
    from spatspark_fast.finetune.run import train

    train(request.config, run, initial, checkpoint)


def _resumed(argv: Sequence[str], checkpoint: Path) -> FinetuneRequest:
    """Read the command line again, over the options of the checkpoint."""
    from spatspark_fast.models.forecaster import DESCRIPTION
    from spatspark_fast.training.checkpoints import read_checkpoint

    state = read_checkpoint(checkpoint)
    if DESCRIPTION not in state:
        raise UserError(f"{checkpoint} is a checkpoint of pretrain: start from it by --init, not by --resume")
    theirs = state["config"]
    request = parse_finetune(argv, base=theirs, prog=program("finetune"))
    ours = to_plain(request.config)
    if ours["init"] != theirs["init"]:
        raise UserError(f"{checkpoint} was begun with --init {theirs['init']}: leave --init out, the weights are in it")
    check_same(_groups(ours), _groups(theirs), checkpoint, FIXED)
    return request


def _groups(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in plain.items() if isinstance(values, dict)}


if __name__ == "__main__":
    sys.exit(main())
