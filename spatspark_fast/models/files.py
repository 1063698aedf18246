"""Read a checkpoint without running anything that may be in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spatspark_fast.errors import UserError

__all__ = ["load_plain"]


def load_plain(path: Path, makers: str) -> Any:
    """Load a file of tensors and plain values onto the CPU; ``makers`` names the commands that write such files.

    Raises UserError if it is missing, not to be read, damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch raises half a dozen kinds for a file that is cut off or not its own
        raise UserError(f"{path} is damaged or no checkpoint of {makers} ({type(error).__name__})") from error
