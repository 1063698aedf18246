"""Where a training command writes, and which checkpoint it goes on from."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from spatspark_fast.common.errors import UserError
from spatspark_fast.pretrain.config import differences
from spatspark_fast.training.rundir import RunDirectory, default_out

__all__ = ["Asked", "check_same", "checkpoint_of", "is_first_process", "out_of"]


class Asked(Protocol):
    """Say what a command line must tell: see `spatspark_fast.common.cli.Request`."""

    preset: str
    out: str | None
    resume: str | None


def is_first_process() -> bool:
    """Tell whether this process writes the run; the others of several devices find its folder in use already."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def out_of(request: Asked, prefix: str = "") -> Path:
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
    return default_out(prefix + request.preset)


def checkpoint_of(request: Asked, run: RunDirectory) -> Path | None:
    """Return the checkpoint to go on from, if there is one."""
    if request.resume is None:
        return None
    if request.resume == "auto":
        return run.last if run.last.exists() else None
    path = Path(request.resume)
    if not path.is_file():
        raise UserError(f"--resume {path}: there is no such checkpoint")
    inside = path.absolute().parent == run.checkpoints.absolute()
    if not inside and is_first_process():
        run.check(resume=False)
    return path


def check_same(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    checkpoint: Path,
    fixed: Sequence[str],
    free: Sequence[str] = (),
) -> None:
    """Raise `UserError` if options with a ``fixed`` beginning, and no ``free`` one, differ from the checkpoint's."""
    changed = [d for d in differences(ours, theirs) if d.startswith(tuple(fixed)) and not d.startswith(tuple(free))]
    if changed:
        raise UserError(
            f"{checkpoint} is of another model: {', '.join(changed)}; leave these out, or start a new "
            "run without --resume"
        )
