"""Check weights that come from a file, and keep those of an encoder in a file that knows its own hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spatspark_fast.common.errors import UserError

__all__ = ["check_weights", "read_weights", "write_weights"]

HASH = "sha256"  # entry of the metadata
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool}
ENTRIES = {"architecture", "layout", "input_scaling", "format"}  # all that files had before they had a hash


def check_weights(state: object, path: str | Path) -> dict[str, Tensor]:
    """Return ``state`` if it maps names to ordinary tensors of finite values.

    Raises UserError naming the file and the first weight that is something else.
    """
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no weights; take another checkpoint")
    for name, value in state.items():
        if not isinstance(name, str) or not _ordinary(value):
            raise UserError(f"{path} is damaged: its weight {name!r} is no ordinary tensor; take another checkpoint")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path}: the weight {name} holds values that are not finite, so its training has failed; take an "
                "earlier checkpoint"
            )
    return state


def _ordinary(value: object) -> bool:
    """Tell whether a tensor lies in memory as a whole: no view that makes much of little, no odd numbers."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        return False
    if value.dtype not in DTYPES:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def write_weights(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; its metadata hold a hash of all that is in it."""
    stamped = {**metadata, HASH: _digest(state, metadata)}
    save_file(dict(state), str(path), metadata=stamped)


def read_weights(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and weights of a safetensors file, and see that they are those that `write_weights` wrote.

    Files of others have no hash and are taken as they are. Raises UserError if the file cannot be read, was changed
    since it was written, or holds values that are not finite.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot read encoder weights from {path}: {error}") from error
    expected = metadata.pop(HASH, None)
    ours = "architecture" in metadata
    # Of a file of ours without a hash: written before there was one, or the name of the entry is what was changed.
    changed = ours and not set(metadata) <= ENTRIES if expected is None else expected != _digest(state, metadata)
    if changed:
        raise UserError(f"{path} is damaged: its content is not what was written; copy it again, or write it anew")
    return metadata, check_weights(state, path)


def _digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a SHA-256 over metadata, names, dtypes, shapes and bytes."""
    about = {name: (str(value.dtype), list(value.shape)) for name, value in state.items()}
    found = hashlib.sha256(json.dumps([dict(metadata), about], sort_keys=True).encode())
    for name in sorted(state):
        found.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
