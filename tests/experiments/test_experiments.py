"""The ablations as a command: what is trained and compared, the table, going on after a stop."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from spatspark_fast.evaluate.scoring import evaluate_forecaster
from spatspark_fast.experiments.__main__ import _lengths, _parser, arms_of, main
from spatspark_fast.experiments.tables import markdown, mean_and_spread, paired_differences
from spatspark_fast.training import module as planned

from ..forecast.forecasts import moving_rain, write_windows
from ..pretrain.runs import checkpoint


def archive(folder: Path) -> Path:
    """Write 8 training and 3 test windows of 6 frames, 64x64."""
    path = write_windows(folder / "rain.h5", moving_rain(3, 6, 64, 64, seed=1))
    other = write_windows(folder / "train.h5", moving_rain(8, 6, 64, 64, seed=2), split="train")
    with h5py.File(path, "a") as file, h5py.File(other) as train:
        train.copy("train", file)
    return path


def command(data: Path, out: Path, *more: str) -> list[str]:
    model = ["model.encoder=test_resnet", "model.decoder=light", "model.decoder_width=16", "data.input_length=3"]
    options = [*model, "trainer.max_steps=2", "data.batch_size=2", "trainer.threads=1", "data.num_workers=0"]
    held = ["data.validation_fraction=0.2", "optim.base_lr=0.1"]
    fixed = [f"--data.path={data}", f"--out={out}", "--seeds=2", "--mask.ratio=0.5", *more]
    return [*fixed, "--pretrain", *options, "data.resident=off", "--finetune", *options, *held, "data.resident=off"]


def test_an_experiment_trains_each_model_once_and_goes_on_after_a_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = archive(tmp_path), tmp_path / "out"
    assert main([*command(data, out, "--studies", "pretraining")]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["scores"]
    assert {name: sorted(runs) for name, runs in results.items()} == {
        "persistence": ["-"],
        "from scratch, conv_tanh": ["0", "1"],
        "pretrained, 0.5 masked, conv_tanh": ["0", "1"],
    }
    assert (out / "results.md").read_text() in shown
    run = out / "finetune" / "pretrained-0.5-masked-conv_tanh" / "seed-1"
    scores = evaluate_forecaster(run / "checkpoints" / "best.ckpt", data, fss_scales=(), spectrum=False)["all"]
    assert results["pretrained, 0.5 masked, conv_tanh"]["1"]["pmse"] == pytest.approx(scores["pmse"])
    config = checkpoint(run)["config"]
    assert config["init"] == str(out / "pretrain" / "ratio-0.5" / "seed-1" / "checkpoints" / "last.ckpt")
    assert (config["trainer"]["seed"], config["model"]["output_norm"]) == (1, "persistence")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.ckpt")}
    os.remove(run / "scores.json")
    monkeypatch.setattr(planned.PlannedTraining, "training_step", None)  # nothing is trained again
    assert main([*command(data, out, "--studies", "pretraining")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.ckpt")}
    assert json.loads((out / "results.json").read_text())["scores"] == results


def names(*argv: str) -> tuple[list[str], list[tuple[str, str]]]:
    arms, pairs = arms_of(_parser().parse_args(["--data.path=a.h5", "--out=b", *argv]))
    return [arm.name for arm in arms], pairs


def test_models_that_studies_share_are_trained_once() -> None:
    arms, pairs = names()
    assert arms == [
        "from scratch, conv_tanh",
        "pretrained, 0.6 masked, conv_tanh",
        "pretrained, 0.6 masked, identity",
        "pretrained, 0.3 masked, conv_tanh",
        "pretrained, 0.75 masked, conv_tanh",
    ]
    usual = "pretrained, 0.6 masked, conv_tanh"
    assert pairs == [
        (usual, "from scratch, conv_tanh"),
        (usual, "pretrained, 0.6 masked, identity"),
        ("pretrained, 0.3 masked, conv_tanh", usual),
        ("pretrained, 0.75 masked, conv_tanh", usual),
    ]
    assert "SmaAt-UNet" in names("--studies", "smaat")[0]
    arms, pairs = names("--studies", "translation", "--model.translations", "attention", "recurrent")
    assert len(arms) == 4
    assert all(theirs.endswith("identity") for _, theirs in pairs)


def test_nothing_needs_to_be_held_out_since_nothing_stops_early() -> None:
    words = ["--finetune", "data.validation-fraction=0", "data.input-length=4", "data.output_length=3"]
    assert _lengths(_parser().parse_args(["--data.path=a.h5", "--out=b", *words])) == (4, 3)


def test_the_table_has_means_spreads_and_wins_at_equal_seeds() -> None:
    ours = {"0": {"pmse": 0.01, "csi@1": 0.5}, "1": {"pmse": 0.03, "csi@1": 0.3}}
    theirs = {"0": {"pmse": 0.025, "csi@1": 0.4}, "1": {"pmse": 0.025, "csi@1": 0.2}}
    still = {"-": {"pmse": 0.5, "csi@1": 0.1}}
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(np.std([1, 3], ddof=1)))
    assert paired_differences(ours, theirs, "pmse") == pytest.approx([-0.015, 0.005])
    table = markdown({"still": still, "a": ours, "b": theirs}, [("a", "b")], ("pmse", "csi@1")).splitlines()
    assert table[2] == "| model | runs | pMSE [(mm/5min)²] | CSI 1 mm/h |"
    assert table[4] == "| still | - | 0.50000 | 0.1000 |"
    assert table[5] == "| a | 2 | 0.02000 ± 0.01414 | 0.4000 ± 0.1414 |"
    assert table[-1] == "| a - b | -0.00500 ± 0.01414 (1 of 2) | +0.1000 ± 0.0000 (2 of 2) |"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--studies", "colour"],
            "'mask_ratio', 'smaat'], got colour",
        ),
        (["--model.translations", "gru"], "--model.translations: expected value of ['conv_tanh', 'identity'"),
        (["--seeds=0"], "--seeds is 0"),
        (["--data.path=/no/such.h5"], "/no/such.h5 does not exist"),
        (["--baselines", "climate"], "--baselines: expected value of ['persistence', 'extrapolation'], got climate"),
    ],
)
def test_wrong_options_end_in_one_sentence(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = archive(tmp_path)
    assert main([*command(data, tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = archive(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert main(command(data, out)) == 2
    assert "is not empty and holds no experiment" in capsys.readouterr().err
    (out / "thesis.txt").unlink()
    (out / "experiment.json").write_text(json.dumps({"data": "other.h5", "pretrain": [], "finetune": []}))
    assert main(command(data, out)) == 2
    assert "other data or options" in capsys.readouterr().err
    assert main([*command(data, tmp_path / "new"), "trainer.epochs"]) == 2
    assert "trainer.epochs is no option" in capsys.readouterr().err
