"""A small disk of our own, and limits of the system: real causes of what can go wrong."""

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["limited", "resized", "size_limit", "small_disk"]


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """Give the folder of a disk of so many bytes; skip the test where this process may mount none."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small disk")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def resized(disk: Path, size: int) -> None:
    """Change the size of a small disk."""
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Set a soft limit of the system for this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def size_limit(most: int) -> Iterator[None]:
    """Let no file of this process grow larger, and hear of it as an error, as Python sets it up."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with limited(resource.RLIMIT_FSIZE, most):
            yield
    finally:
        signal.signal(signal.SIGXFSZ, previous)
