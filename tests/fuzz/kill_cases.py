"""The commands that write, as small as they can be, and what must be equal after a kill."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import onnx
import torch
import xarray as xr
from PIL import Image
from safetensors.torch import load_file

from ..finetune.runs import SMALL as SMALL_FINETUNE
from ..forecast.forecasts import SMALL as SMALL_MODEL
from ..forecast.forecasts import moving_rain, save_checkpoint, write_windows
from ..prepare.archives import write_archive
from ..pretrain.runs import SMALL as SMALL_PRETRAIN
from ..pretrain.runs import TIMES

__all__ = ["CASES", "Case", "content", "prepare_inputs", "rests"]


class Case(NamedTuple):
    """A command: its words for a folder of inputs and an output, and what is added when it goes on."""

    command: str
    words: Callable[[Path, Path], list[str]]
    again: tuple[str, ...] = ()
    share: int = 1

    def main(self) -> Callable[[list[str]], int]:
        """Return the command."""
        return import_module(f"spatspark_fast.{self.command.partition('-')[0]}.__main__").main


def prepare_inputs(place: Path) -> None:
    """Write what the commands read."""
    write_archive(place / "archive", list(range(40)))
    rain = write_windows(place / "rain.h5", moving_rain(3, 6, 64, 64, seed=1))
    write_windows(place / "train.h5", moving_rain(10, 6, 64, 64, seed=2), split="train")
    with h5py.File(rain, "a") as file, h5py.File(place / "train.h5") as train:
        train.copy("train", file)
    options = {**SMALL_MODEL, "encoder": "test_resnet"}
    save_checkpoint(place / "model.ckpt", lengths=(3, 3), **options)


def _options(small: dict[str, Any], place: Path, out: Path, **changes: Any) -> list[str]:
    options = (
        small | {"data.cache": place / "cache"} | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return [f"--out={out}", *(f"--{name}={value}" for name, value in options.items())]


def _pretrain(place: Path, out: Path) -> list[str]:
    return _options(SMALL_PRETRAIN, place, out, trainer__keep_every=1, trainer__picture_every=2, optim__ema=0.9)


def _pretrain_file(place: Path, out: Path) -> list[str]:
    changes: dict[str, Any] = {"data__path": place / "rain.h5", "data__resident": "off", "data__num_workers": 2}
    return _options(SMALL_PRETRAIN, place, out, **changes, data__flip="true", trainer__max_steps=7)


def _finetune(place: Path, out: Path) -> list[str]:
    changes: dict[str, Any] = {"data__path": place / "rain.h5", "data__cache": f"{out}-cache", "data__num_workers": 0}
    return _options(SMALL_FINETUNE, place, out, **changes, trainer__max_steps=10)


def _prepare(place: Path, out: Path) -> list[str]:
    few = ["--data.input_length=3", "--data.output_length=2", "--crop=0:48,0:40", "--data.num_workers=0"]
    return ["--source=knmi", f"--data.path={place / 'archive'}", f"--out={out}.h5", *few]


def _merge(place: Path, out: Path) -> list[str]:
    return ["--merge", str(place / "rain.h5"), str(place / "rain.h5"), f"--out={out}.h5", "--data.synthetic_windows=4"]


def _forecast(place: Path, out: Path) -> list[str]:
    return [f"--checkpoint={place / 'model.ckpt'}", f"--data.path={place / 'rain.h5'}", f"--out={out}"]


def _export(place: Path, out: Path) -> list[str]:
    return [f"--checkpoint={place / 'model.ckpt'}", f"--export={out}.onnx"]


def _evaluate(place: Path, out: Path) -> list[str]:
    few = ["--panels=1", "--fss_scales=1", "--spectrum=false"]
    return [f"--checkpoint={place / 'model.ckpt'}", f"--data.path={place / 'rain.h5'}", f"--out={out}", *few]


def _experiments(place: Path, out: Path) -> list[str]:
    model = ["model.encoder=test_resnet", "model.decoder=light", "model.decoder_width=16", "data.input_length=3"]
    options = [*model, "trainer.max_steps=2", "data.batch_size=2", "trainer.threads=1", "data.resident=off"]
    options += ["data.num_workers=0"]
    fixed = [f"--data.path={place / 'rain.h5'}", f"--out={out}", "--seeds=1", "--studies", "pretraining"]
    return [*fixed, "--pretrain", *options, "--finetune", *options, "data.validation_fraction=0.2"]


CASES = (
    Case("pretrain", _pretrain, ("--resume",), 5),
    Case("pretrain-workers", _pretrain_file, ("--resume",), 3),
    Case("finetune", _finetune, ("--resume",), 5),
    Case("prepare", _prepare, ("--overwrite",), 2),
    Case("prepare-merge", _merge, ("--overwrite",)),
    Case("forecast", _forecast, ("--overwrite",), 2),
    Case("forecast-export", _export, ("--overwrite",)),
    Case("evaluate", _evaluate, ("--overwrite",), 2),
    Case("experiments", _experiments, share=3),
)


def content(out: Path) -> dict[str, Any]:
    """Return what the files of a run hold, by name, without times; raise what a reader raises for one that is torn."""
    files = [path for path in sorted(out.parent.rglob("*")) if path.is_file() and path not in rests(out)]
    return {str(path.relative_to(out.parent)): _read(path) for path in files if _counts(path)}


def rests(out: Path) -> list[Path]:
    """Return temporary files, half files and locks that lie about."""
    return [p for p in out.parent.rglob("*") if p.name.endswith((".tmp", ".part")) or p.name == ".lock"]


def _counts(path: Path) -> bool:
    """Leave out what commands said, and caches, which know their own checksums."""
    return path.suffix != ".log" and "cache" not in path.parent.name


def _read(path: Path) -> Any:
    return READERS[path.suffix](path)


def _rows(path: Path) -> Any:
    with path.open(newline="") as file:
        return [{name: row[name] for name in row if name not in (*TIMES, "step_share")} for row in csv.DictReader(file)]


def _checkpoint(path: Path) -> Any:
    state = torch.load(path, weights_only=True)
    kept = {name: state.get(name) for name in ("state_dict", "optimizer_states", "position", "global_step", "data")}
    return kept | {"validation": state.get("callbacks", {}).get("Validation")}


def _hdf5(path: Path) -> Any:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, one: found.update({name: one[()]}) if isinstance(one, h5py.Dataset) else None)
        return found


def _dataset(path: Path) -> Any:
    with xr.open_dataset(path) as dataset:
        return {str(name): np.asarray(dataset[name]) for name in dataset.variables}


def _onnx(path: Path) -> Any:
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return sorted(hashlib.sha256(one.raw_data).hexdigest() for one in model.graph.initializer)


def _json(path: Path) -> Any:
    found = json.loads(path.read_text())
    for model in found.get("models", {}).values():
        model.pop("seconds_per_window", None)
    return "sessions differ" if path.name == "versions.json" else found.get("scores", found)


READERS: dict[str, Callable[[Path], Any]] = {
    ".ckpt": _checkpoint,
    ".safetensors": lambda path: load_file(path),
    ".csv": _rows,
    ".json": _json,
    ".h5": _hdf5,
    ".nc": _dataset,
    ".onnx": _onnx,
    ".png": lambda path: np.asarray(Image.open(path)),
    ".gif": lambda path: np.asarray(Image.open(path)),
    ".md": Path.read_text,
    ".yaml": lambda path: re.sub(r"/\S*/", "", path.read_text()),
}
