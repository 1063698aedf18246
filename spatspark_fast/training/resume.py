"""Where a training writes, and which checkpoint it goes on from."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from spatspark_fast.common.errors import UserError, WriteError
from spatspark_fast.common.files import check_folder
from spatspark_fast.common.locks import owned
from spatspark_fast.common.options import differences, from_plain, groups_of, to_plain
from spatspark_fast.training.command import Request, TrainingCommand, parse_training
from spatspark_fast.training.rundir import RunDirectory

__all__ = ["begin", "parse_resumed"]

Config = TypeVar("Config")


@contextlib.contextmanager
def begin(command: TrainingCommand[Any], argv: Sequence[str]) -> Iterator[tuple[RunDirectory, Path | None]]:
    """Give the run directory of a command line, and the checkpoint that it goes on from, if any.

    The folder belongs to this process while the block runs; of several processes of one training, to the first.
    Raises `UserError` for a folder that cannot be written, that another process writes or that holds another run.
    """
    words = [word for word in argv if not word.startswith("--print_config")]
    request = parse_training(command, words)
    run = RunDirectory(_out_of(request, command.prefix))
    writes = _is_first_process() and len(words) == len(argv)
    with contextlib.ExitStack() as stack:
        if writes:
            check_folder(run.root, overwrite=True)
            stack.enter_context(owned(run.root))
        checkpoint = _checkpoint_of(request, run)
        inside = checkpoint is None or checkpoint.absolute().parent == run.checkpoints.absolute()
        if writes and not (request.resume is not None and inside):
            run.check_unused()
        try:
            yield run, checkpoint
        except WriteError as error:
            raise UserError(f"{error}; the same command with --resume goes on") from error


def parse_resumed(command: TrainingCommand[Config], argv: Sequence[str], checkpoint: Path) -> Request[Config]:
    """Read the command line of a run that goes on, over the options of its checkpoint.

    Raises `UserError` for a checkpoint of another command, and for options that cannot change any more.
    """
    from spatspark_fast.training.checkpoints import read_checkpoint  # torch takes seconds

    theirs = read_checkpoint(checkpoint)["config"]
    groups = groups_of(command.config)
    if missing := [name for name in groups if name not in theirs]:
        raise UserError(
            f"{checkpoint} is no checkpoint of {command.name}, as it has no options {missing[0]}.*: {command.foreign}"
        )
    try:
        complete = to_plain(from_plain(command.config, theirs))  # an option that is newer than the run has its default
    except UserError as error:
        raise UserError(
            f"{checkpoint} is of another version, or was edited: {error}; go on with the version that wrote it"
        ) from None
    request = parse_training(command, argv, base=theirs)
    ours = to_plain(request.config)
    for name in ours:
        if name not in groups and ours[name] != theirs.get(name):
            raise UserError(f"{checkpoint} was begun with --{name} {theirs.get(name)}: leave --{name} out")
    fixed, free = command.fixed, command.free
    changed = [d for d in differences(ours, complete) if d.startswith(fixed) and not d.startswith(free)]
    if changed:
        raise UserError(
            f"{checkpoint} is of another model: {', '.join(changed)}; leave these out, or start a new "
            "run without --resume"
        )
    return request


def _is_first_process() -> bool:
    """Tell whether this process writes the run; the others of several devices find its folder in use already."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _out_of(request: Request[Any], prefix: str) -> Path:
    """Return the run directory that is asked for; raise `UserError` where ``--resume`` leaves it open."""
    if request.out is not None:
        return Path(request.out)
    if request.resume == "auto":
        raise UserError("--resume needs --out with the folder of the run to go on with, or the path of a checkpoint")
    if request.resume is not None:
        root = Path(request.resume).absolute().parent.parent
        if not RunDirectory(root).config.exists():
            raise UserError(f"--resume {request.resume} lies in no run directory: say by --out where to write")
        return root
    return Path("runs") / f"{prefix}{request.preset}-{datetime.now():%Y%m%d-%H%M%S}"


def _checkpoint_of(request: Request[Any], run: RunDirectory) -> Path | None:
    """Return the checkpoint to go on from, if there is one; raise `UserError` for a path that is none."""
    if request.resume is None:
        return None
    if request.resume == "auto":
        return run.last if run.last.exists() else None
    path = Path(request.resume)
    if not path.is_file():
        raise UserError(f"--resume {path}: there is no such checkpoint")
    return path
