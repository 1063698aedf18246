"""Finetuning from memory is, bit by bit, finetuning that reads its windows one by one."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from spatspark_fast.data.synthetic import SyntheticRadar

from ..pretrain.runs import checkpoint, rows, same, same_training
from .runs import finetune


def write(path: Path) -> Path:
    """Write 10 windows of 3 + 3 frames whose pixels are those of synthetic radar, a tenth of them without data."""
    radar = SyntheticRadar(10, 3, 3, 64)
    images = np.stack([torch.cat((radar[i]["input"], radar[i]["target"])).numpy() for i in range(10)])
    valid = np.random.default_rng(0).random(images.shape) < 0.9
    with h5py.File(path, "w") as file:
        file["train/images"] = np.where(valid, images, np.float32(0))
        file["train/valid"] = valid
        file.attrs["scale_mm_per_5min"] = float(radar.scale)
    return path


@pytest.mark.parametrize("source", ["synthetic radar", "a file"])
def test_training_and_validation_from_memory_change_no_bit(tmp_path: Path, source: str) -> None:
    changes: dict[str, Any] = {"trainer__epochs": 2}
    if source == "a file":
        path = write(tmp_path / "a.h5")
        changes |= {"data__path": path, "data__crop": 32, "data__flip": "true", "data__quarter_turns": "true"}
    for resident in ("off", "auto"):
        assert finetune(tmp_path / resident, data__resident=resident, **changes) == 0
    off, auto = (checkpoint(tmp_path / resident) for resident in ("off", "auto"))
    assert same_training(off, auto)
    assert same(off["callbacks"], auto["callbacks"])
    assert rows(tmp_path / "off", times=False) == rows(tmp_path / "auto", times=False)
    assert [float(row["validation_mse"]) > 0 for row in rows(tmp_path / "auto") if row["validation_mse"]] == [True] * 2
    copies = list((tmp_path / "cache").glob("*.windows"))
    assert len(copies) == (source == "a file")


def test_reading_processes_change_no_bit(tmp_path: Path) -> None:
    changes = {"data__path": write(tmp_path / "a.h5"), "data__resident": "off", "trainer__epochs": 2}
    for workers in (0, 2):
        assert finetune(tmp_path / str(workers), data__num_workers=workers, **changes) == 0
    one, two = (checkpoint(tmp_path / str(workers)) for workers in (0, 2))
    assert same_training(one, two)
    assert same(one["callbacks"], two["callbacks"])
