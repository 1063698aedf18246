"""Show how far a command has come."""

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

__all__ = ["Track", "silently", "track"]

Item = TypeVar("Item")


class Track(Protocol):
    """Show progress over items."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """Yield ``total`` items; ``what`` is a word for what is done with them."""
        ...


def silently(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Show nothing."""
    del what, total
    return iter(items)


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Show a progress bar on stderr where that is a terminal."""
    # Here and not above: processes that read files import the commands, and need none of that.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(items, total=total, description=what)
