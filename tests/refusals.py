"""How every command refuses: exit code 2, one line on stderr, nothing on stdout."""

from collections.abc import Callable

import pytest

__all__ = ["refusal"]


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: list[str]) -> str:
    """Run a command that has to refuse; return the sentence it says."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err
