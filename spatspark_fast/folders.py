"""Check and make the folder that a command writes its results to."""

import os
from pathlib import Path

from spatspark_fast.errors import UserError

__all__ = ["check_folder", "make_folder"]


def check_folder(out: Path, overwrite: bool) -> None:
    """Check, before any work, that results can be written to ``out``; nothing is made yet.

    Raises:
        UserError: it is a file, cannot be written, or holds something and ``overwrite`` is not asked for.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written: no permission in {existing}")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose another folder, or --overwrite")


def make_folder(out: Path) -> None:
    """Make the folder; raise `UserError` where the system does not let us."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
