"""The run directory: what a training writes, under which name, and how it survives being killed.

::

    OUT/config.yaml            every option, resolved; goes back in through --config
    OUT/versions.json          seed, and for each session: versions, command, time, device
    OUT/metrics.csv            one row per logged optimiser step
    OUT/checkpoints/last.ckpt  newest state; also epoch-NNNN.ckpt, where asked for
    OUT/checkpoints/best.ckpt  of a forecaster: the weights with the best validation score
    OUT/forecast.png           of a forecaster: observation and forecast of one window
    OUT/pictures/              of an encoder: reconstructions; OUT/reconstruction.png is the newest
    OUT/encoder.safetensors    of an encoder: its weights under timm's names, at the end
    OUT/tensorboard/           the same metrics for TensorBoard
"""

import json
import platform
import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import atomic_path, package_versions, used, writing

__all__ = ["RunDirectory"]


class RunDirectory:
    """Own the paths of one run directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.versions = root / "versions.json"
        self.metrics = root / "metrics.csv"
        self.checkpoints = root / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.pictures = root / "pictures"
        self.picture = root / "reconstruction.png"
        self.forecast = root / "forecast.png"
        self.encoder = root / "encoder.safetensors"
        self.tensorboard = root / "tensorboard"

    def check_unused(self) -> None:
        """Check that the folder holds nothing; raise `UserError` naming the path and the remedy."""
        if used(self.root):
            what = "already holds a run" if self.config.exists() else "is not empty"
            raise UserError(f"--out {self.root} {what}: choose another folder, or go on with that run by --resume")

    def prepare(self) -> None:
        """Make the folders and clear away what a killed process left half written."""
        for folder in (self.root, self.checkpoints, self.pictures):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for stale in folder.glob(".*.tmp"):
                    stale.unlink(missing_ok=True)

    def stored_config(self) -> dict[str, Any] | None:
        """Return the options of the run in this folder, or None where there is none."""
        if not self.config.exists():
            return None
        try:
            content = yaml.safe_load(self.config.read_text())
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {self.config}: {error}; repair or remove it") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.config} holds no options; repair or remove it")
        return content

    def save_config(self, plain: dict[str, Any]) -> None:
        """Write the options; other options of an earlier session stay beside them as ``config.N.yaml``."""
        if self.stored_config() not in (None, plain):
            number = len(list(self.root.glob("config.*.yaml"))) + 1
            self.write(self.root / f"config.{number}.yaml", lambda path: shutil.copyfile(self.config, path))
        with atomic_path(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(plain, sort_keys=False))

    def save_versions(self, seed: int, device: str, resumed_from: str | None) -> None:
        """Add this session to ``versions.json``."""
        record: dict[str, Any] = self._record() if self.versions.exists() else {"sessions": []}
        record["seed"] = seed
        session = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "resumed_from": resumed_from,
            "platform": platform.platform(),
            "device": device,
            "versions": package_versions(),
        }
        record["sessions"] = [*record["sessions"], session]
        with atomic_path(self.versions) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")

    def _record(self) -> dict[str, Any]:
        """Return what ``versions.json`` holds; raise UserError if that is damaged."""
        try:
            record = json.loads(self.versions.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {self.versions}: {error}; repair or remove it") from error
        sessions = record.get("sessions") if isinstance(record, dict) else None
        if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
            raise UserError(f"{self.versions} holds no sessions; repair or remove it")
        return record

    def add_to_session(self, found: dict[str, Any]) -> None:
        """Add what a session found out, plain values, to its entry in ``versions.json``."""
        record = self._record()
        record["sessions"][-1] |= found
        with atomic_path(self.versions) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")

    def finish(self, step: int, *files: Path) -> None:
        """Write down that this session has written all that a run leaves after its last step, the ``files`` too."""
        self.add_to_session({"finished": {"step": step, "files": [str(path.relative_to(self.root)) for path in files]}})

    def finished(self, step: int) -> bool:
        """Tell whether the newest session ended with ``step`` and with all files, and these are still there."""
        try:
            done = json.loads(self.versions.read_text())["sessions"][-1]["finished"]
            return done["step"] == step and all((self.root / name).exists() for name in done["files"])
        except (OSError, ValueError, LookupError, TypeError):
            return False  # of a session that was killed, or of an older version: written once more

    def kept(self, epoch: int) -> Path:
        """Return the path of the checkpoint that is kept after ``epoch`` epochs."""
        return self.checkpoints / f"epoch-{epoch:04d}.ckpt"

    def write(self, target: Path, writer: Callable[[Path], object]) -> None:
        """Write a file atomically through ``writer(path)``."""
        with atomic_path(target) as temporary:
            writer(temporary)
