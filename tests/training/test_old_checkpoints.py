"""Runs of the version before the big move load, go on, and end where that version would have ended."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spatspark_fast.evaluate.scoring import evaluate_forecaster
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.forecast.__main__ import main as forecast
from spatspark_fast.models.registry import load_forecaster
from spatspark_fast.pretrain.__main__ import main as pretrain

from ..forecast.forecasts import moving_rain, write_windows
from ..pretrain.runs import rows

OLD = Path(__file__).parents[1] / "data_files" / "runs_before_the_move"
COMMANDS = {"pretrained": pretrain, "finetuned": finetune}


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def norms(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of the weights of each part, such as the encoder."""
    parts = {name.split(".")[1] for name in state if name.count(".") > 1}
    members = {part: [value for name, value in state.items() if name.split(".")[1] == part] for part in parts}
    return {part: sum(float(v.double().square().sum()) for v in values) ** 0.5 for part, values in members.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_run_goes_on_and_ends_as_it_would_have(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    shutil.copytree(OLD / name, run)
    expected: dict[str, Any] = json.loads((OLD / "expected.json").read_text())[name]
    assert COMMANDS[name]([f"--out={run}", "--resume"]) == 0
    found = [{key: float(value) if value else None for key, value in row.items()} for row in rows(run)]
    assert len(found) == len(expected["rows"])
    for row, old in zip(found, expected["rows"], strict=True):
        # The same bits on the same processor; another one rounds its sums otherwise.
        assert {key: row[key] or 0.0 for key in old} == pytest.approx({key: old[key] or 0.0 for key in old}, rel=1e-3)
    state = torch.load(last(run), weights_only=True)
    assert (state["position"], state["global_step"]) == (expected["position"], expected["global_step"])
    assert norms(state["state_dict"]) == pytest.approx(expected["norms"], rel=1e-5)


def test_finetuning_starts_from_an_old_pretraining(tmp_path: Path) -> None:
    argv = [f"--init={last(OLD / 'pretrained')}", f"--out={tmp_path / 'run'}", "--data.synthetic_windows=10"]
    argv += ["--data.synthetic_size=64", "--data.batch_size=2", "--data.output_length=3", "--trainer.max_steps=1"]
    assert finetune([*argv, "--optim.base_lr=1e-9", "--trainer.threads=1", "--trainer.tensorboard=false"]) == 0
    old, new = (torch.load(last(p), weights_only=True)["state_dict"] for p in (OLD / "pretrained", tmp_path / "run"))
    encoder = [name for name in old if name.startswith("spark.encoder.") and name.endswith("weight")]
    assert encoder
    for name in encoder:
        torch.testing.assert_close(new[name.replace("spark.", "model.", 1)], old[name], rtol=1e-4, atol=1e-6)


def test_an_old_finetuning_forecasts_and_is_scored(tmp_path: Path) -> None:
    checkpoint = last(OLD / "finetuned")
    loaded = load_forecaster(checkpoint)
    assert (loaded.in_length, loaded.out_length) == (3, 3)
    file = write_windows(tmp_path / "windows.h5", moving_rain(2, 6, 64, 64))
    scores = evaluate_forecaster(checkpoint, file, fss_scales=())["all"]
    assert 0 < scores["pmse"] < math.inf
    argv = ["--checkpoint", str(checkpoint), "--data.path", str(file), "--out", str(tmp_path / "forecasts")]
    assert forecast([*argv, "--pictures", "false"]) == 0
    assert [path.suffix for path in (tmp_path / "forecasts").iterdir()] == [".nc"]
