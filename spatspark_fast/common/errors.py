"""The exceptions that a command turns into a sentence and an exit code, and what helps against a scarce machine."""

from __future__ import annotations

import errno
import os

__all__ = ["RunStopped", "UserError", "WriteError", "remedy"]

REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose another disk",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower --data.num_workers",
    errno.ENFILE: "close other programs: the machine has no file handles left",
    errno.EIO: "look after that disk",
}


class UserError(ValueError):
    """Report bad input in one sentence that names the file, option or shape and the remedy."""


class WriteError(UserError):
    """Tell that a file could not be written, why, and what helps; what stood there before is whole."""


class RunStopped(BaseException):
    """End a command after a signal; no ``except Exception`` on the way stops that, as with KeyboardInterrupt."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


def remedy(number: int) -> str:
    """Say a code of the system (errno) in words, and what helps."""
    help_ = REMEDIES.get(number)
    return os.strerror(number) + (f"; {help_}" if help_ else "")
