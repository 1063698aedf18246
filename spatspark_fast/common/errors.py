"""The one exception that a command turns into a sentence and exit code 2."""

__all__ = ["RunStopped", "UserError"]


class UserError(ValueError):
    """Report bad input in one sentence that names the file, option or shape and the remedy."""


class RunStopped(Exception):  # noqa: N818 (a stop on request is no error)
    """End a command after a signal, when all that is worth saving has been saved."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum
