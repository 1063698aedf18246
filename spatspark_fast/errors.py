"""The one exception that a command turns into a sentence and exit code 2."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Report bad input in one sentence that names the file, option or shape and the remedy."""
