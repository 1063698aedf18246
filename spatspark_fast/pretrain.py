"""Pretrain an encoder by masked image modelling: ``python -m spatspark_fast.pretrain``.

Without options the preset `demo` runs on built-in synthetic radar. Heavy imports wait until the command line
is known to be right.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatspark_fast.cli import Request, parse_pretrain, run_command
from spatspark_fast.config import differences, to_plain
from spatspark_fast.errors import UserError
from spatspark_fast.runs import RunDirectory, default_out

__all__ = ["main"]

PROG = "python -m spatspark_fast.pretrain"

# A checkpoint goes on only with the same weights and the same steps; the engine and all else may change.
FIXED = ("model.", "data.input_length", "trainer.accumulate")
FREE = ("model.backend",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: pretrain(sys.argv[1:] if argv is None else argv))


def pretrain(argv: Sequence[str]) -> None:
    """Read the command line, then train; raise `UserError` for whatever is wrong with the input."""
    request = parse_pretrain(argv, prog=PROG)
    run = RunDirectory(_out(request))
    checkpoint = _checkpoint(request, run)
    if _is_first_process():
        run.check(resume=request.resume is not None)
    if checkpoint is not None:
        theirs = _options_of(checkpoint, run)
        request = parse_pretrain(argv, base=theirs, prog=PROG)
        _check_same(to_plain(request.config), theirs, checkpoint)
    from spatspark_fast.training.run import train

    train(request.config, run, checkpoint)


def _is_first_process() -> bool:
    """Tell whether this process writes the run; the others of several devices find its folder in use already."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _out(request: Request) -> Path:
    if request.out is not None:
        return Path(request.out)
    if request.resume == "auto":
        raise UserError("--resume needs --out with the folder of the run to go on with, or the path of a checkpoint")
    if request.resume is not None:
        root = Path(request.resume).absolute().parent.parent
        if not RunDirectory(root).config.exists():
            raise UserError(f"--resume {request.resume} lies in no run directory: say by --out where to write")
        return root
    return default_out(request.preset)


def _checkpoint(request: Request, run: RunDirectory) -> Path | None:
    """Return the checkpoint to go on from, if there is one."""
    if request.resume is None:
        return None
    if request.resume == "auto":
        return run.last if run.last.exists() else None
    path = Path(request.resume)
    if not path.is_file():
        raise UserError(f"--resume {path}: there is no such checkpoint")
    inside = path.absolute().parent == run.checkpoints.absolute()
    if not inside and _is_first_process():
        run.check(resume=False)
    return path


def _options_of(checkpoint: Path, run: RunDirectory) -> dict[str, Any]:
    """Return the options with which a checkpoint was made."""
    from spatspark_fast.training.checkpoints import read_checkpoint

    return read_checkpoint(checkpoint)["config"]


def _check_same(ours: dict[str, Any], theirs: dict[str, Any], checkpoint: Path) -> None:
    changed = [d for d in differences(ours, theirs) if d.startswith(FIXED) and not d.startswith(FREE)]
    if changed:
        raise UserError(
            f"{checkpoint} is of another model: {', '.join(changed)}; leave these out, or start a new "
            "run without --resume"
        )


if __name__ == "__main__":
    sys.exit(main())
