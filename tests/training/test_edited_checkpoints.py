"""A checkpoint that was edited, or is of another version, ends in one sentence, whoever reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spatspark_fast.common.errors import UserError
from spatspark_fast.evaluate.__main__ import main as evaluate
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.forecast.__main__ import main as forecast
from spatspark_fast.forecast.nowcasting import nowcast
from spatspark_fast.pretrain.__main__ import main as pretrain

from ..forecast.forecasts import moving_rain, write_windows
from ..refusals import refusal

OLD = Path(__file__).parents[1] / "data_files" / "runs_before_the_move"
COMMANDS = {"pretrained": pretrain, "finetuned": finetune}
NESTED: list[Any] = []
for _ in range(200):
    NESTED = [NESTED]
Edit = Callable[[dict[str, Any]], object]


def at(*places: Any, to: Any) -> Edit:
    """Return what puts a value at a place of nested dicts and lists."""

    def edit(checkpoint: Any) -> None:
        for place in places[:-1]:
            checkpoint = checkpoint[place]
        checkpoint[places[-1]] = to

    return edit


def without(*places: Any) -> Edit:
    def edit(checkpoint: Any) -> None:
        for place in places[:-1]:
            checkpoint = checkpoint[place]
        del checkpoint[places[-1]]

    return edit


def weight(change: Callable[[torch.Tensor], object], beginning: str = "") -> Edit:
    """Return what changes one weight: the first of several dimensions whose name begins so."""

    def edit(checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        name = next(name for name in state if state[name].ndim > 1 and name.startswith(beginning))
        state[name] = change(state[name])

    return edit


MOMENTS = ("optimizer_states", 0, "state", 0)
LOOP = ("loops", "fit_loop", "epoch_loop.batch_progress")
WEIGHTS: dict[str, tuple[Edit, str]] = {
    "no weights": (at("state_dict", to=[]), "holds no weights"),
    "a weight that is a number": (weight(lambda w: 1.0), "is no ordinary tensor"),
    "a weight of no device": (weight(lambda w: torch.empty(w.shape, device="meta")), "is no ordinary tensor"),
    "a weight of much from little": (weight(lambda w: torch.zeros(()).expand(2**40)), "is no ordinary tensor"),
    "sparse": (weight(lambda w: w.to_sparse()), "is no ordinary tensor"),
    "complex": (weight(lambda w: w.to(torch.complex64)), "is no ordinary tensor"),
    "NaN": (weight(lambda w: w * torch.nan), "holds values that are not finite"),
}
RESUMED: dict[str, tuple[Edit, str]] = {
    **WEIGHTS,
    "no weights": (at("state_dict", to=[]), "option state_dict is []"),
    "another shape": (weight(lambda w: w[:1]), "does not fit this run"),
    "no options": (at("config", to=None), "option config is None"),
    "options that are a list": (at("config", "model", to=[1]), "option model is [1]"),
    "options that are text": (at("config", "trainer", to="x"), "option trainer is 'x'"),
    "an option of a later version": (at("config", "model", "colour", to="red"), "unknown option model.colour"),
    "a group of a later version": (at("config", "colours", to={}), "unknown option colours"),
    "an option of another type": (at("config", "trainer", "epochs", to="many"), "option trainer.epochs is 'many'"),
    "an option of a later choice": (at("config", "optim", "name", to="muon"), "option optim.name is 'muon'"),
    "deep options": (at("config", "data", "path", to=NESTED), "option data.path is [[[[[["),
    "an absurd plan": (at("config", "trainer", "epochs", to=-3), "trainer.epochs is -3"),
    "a negative step": (at("global_step", to=-1), "is negative"),
    "a position of text": (at("position", to="far"), "option position is 'far'"),
    "a position elsewhere": (at("position", to=3), "3 batches and"),
    "a step elsewhere": (at("global_step", to=3), "do not belong together"),
    "no batches": (without("batches_per_epoch"), "lacks batches_per_epoch"),
    "no loops": (without("loops"), "lacks loops"),
    "no loop": (at("loops", to={}), "does not fit this run"),
    "a loop of text": (at(*LOOP, "current", "ready", to="x"), "ready is no number"),
    "a loop of less than nothing": (at(*LOOP, "total", "completed", to=-9), "completed is no number"),
    "a loop of another kind": (at(*LOOP, to=[1]), "epoch_loop.batch_progress is no group"),
    "no optimiser": (at("optimizer_states", to=[]), "has no state of one optimiser"),
    "an optimiser without a past": (
        at("optimizer_states", 0, "state", to={}),
        "of the optimiser all moments are missing",
    ),
    "moments of another shape": (at(*MOMENTS, "exp_avg", to=torch.zeros(3)), "exp_avg is not that of a weight"),
    "infinite moments": (at(*MOMENTS, "exp_avg_sq", to=torch.tensor(torch.inf)), "exp_avg_sq is not that of"),
    "no moments": (without(*MOMENTS, "exp_avg"), "exp_avg is not that of a weight"),
    "a rate of text": (at("optimizer_states", 0, "param_groups", 0, "eps", to="x"), "eps is no number"),
    "fewer groups": (without("optimizer_states", 0, "param_groups", 0), "does not fit this run"),
    "a recorder of text": (at("callbacks", "Recorder", "sum", to="x"), "sum is no number"),
    "a recorder of less": (without("callbacks", "Recorder", "batches"), "does not fit this run"),
}
FORECASTING: dict[str, tuple[Edit, str]] = {
    **WEIGHTS,
    "no description": (at("forecaster", to=None), "describes a model that its weights do not fit: options"),
    "half a description": (without("forecaster", "kind"), "its weights do not fit: 'kind'"),
    "another kind": (at("forecaster", "kind", to="oracle"), "unknown kind of model 'oracle'"),
    "an option of a later version": (at("forecaster", "options", "colour", to=1), "unknown option colour"),
    "an option of another type": (at("forecaster", "options", "patch", to="x"), "option patch is 'x'"),
    "absurd width": (at("forecaster", "options", "decoder_width", to=10**9), "do not fit: "),
    "absurd length": (at("forecaster", "out_length", to=10**9), "at most 4096, got 1000000000"),
    "length of text": (at("forecaster", "in_length", to="3"), "option in_length is '3'"),
    "scale of 0": (at("forecaster", "scale", to=0.0), "scale_mm_per_5min is 0"),
    "scale of NaN": (at("forecaster", "scale", to=float("nan")), "scale_mm_per_5min is nan"),
    "no such encoder": (at("forecaster", "options", "encoder", to="test_byobnot"), "unknown encoder"),
    "another shape": (weight(lambda w: w[:1]), "do not fit: of encoder."),
}
INITIAL: dict[str, tuple[Edit, str]] = {
    **WEIGHTS,
    "no options": (at("config", to=3), "lacks options or weights"),
    "options that are a list": (at("config", "model", to=[1]), "options are [1]"),
    "an option of another type": (at("config", "model", "patch", to="x"), "option patch is 'x'"),
    "a length of text": (at("config", "data", "input_length", to="x"), "option input_length is 'x'"),
    "another shape": (weight(lambda w: w[:1], "spark.encoder."), "do not fit this model: encoder."),
}


def edited(source: Path, path: Path, edit: Edit) -> Path:
    checkpoint = torch.load(source, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


# The two commands share what they check: by default each kind is tried on one of them.
GOING_ON = [
    pytest.param(kind, name, marks=() if (number + turn) % 2 == 0 else pytest.mark.rest)
    for number, kind in enumerate(RESUMED)
    for turn, name in enumerate(COMMANDS)
]


@pytest.mark.parametrize(("kind", "name"), GOING_ON)
def test_going_on(kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, words = RESUMED[kind]
    run = tmp_path / name
    shutil.copytree(OLD / name, run)
    last = run / "checkpoints" / "last.ckpt"
    edited(last, last, edit)
    content = last.read_bytes()
    assert COMMANDS[name]([f"--out={run}", "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert words in error
    assert "last.ckpt" in error or "--trainer" in error
    assert last.read_bytes() == content


@pytest.mark.parametrize("kind", FORECASTING)
def test_forecasts_and_scores(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, words = FORECASTING[kind]
    path = edited(OLD / "finetuned" / "checkpoints" / "last.ckpt", tmp_path / "odd.ckpt", edit)
    file = write_windows(tmp_path / "rain.h5", moving_rain(1, 6, 32, 32))
    argv = ["--checkpoint", str(path), "--data.path", str(file), "--out", str(tmp_path / "out")]
    for main in (forecast, evaluate):
        said = refusal(capsys, main, argv)
        assert words in said
        assert "odd.ckpt" in said
    assert "odd.ckpt" in refusal(capsys, forecast, [*argv[:2], "--export", str(tmp_path / "odd.onnx")])
    with pytest.raises(UserError, match=r"odd\.ckpt"):
        nowcast(np.zeros((3, 32, 32)), 3, path)


@pytest.mark.parametrize("kind", INITIAL)
def test_starting_weights(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, words = INITIAL[kind]
    path = edited(OLD / "pretrained" / "checkpoints" / "last.ckpt", tmp_path / "odd.ckpt", edit)
    argv = [f"--init={path}", f"--out={tmp_path / 'run'}", "--data.synthetic_windows=10", "--data.synthetic_size=64"]
    said = refusal(capsys, finetune, [*argv, "--data.batch_size=2"])
    assert words in said
    assert "odd.ckpt" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", b"data: [\n", "config.yaml"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml"),
        ("config.yaml", b"3\n", "config.yaml holds no options"),
        ("versions.json", b"{", "versions.json"),
        ("versions.json", b"\xff{}", "versions.json"),
        ("versions.json", b"[1]", "versions.json holds no sessions"),
        ("versions.json", json.dumps({"sessions": [1]}).encode(), "versions.json holds no sessions"),
        ("metrics.csv", b"step,loss\n1,0.5\nx,0.5\n2,0.4\n", "metrics.csv is damaged in line 3"),
        ("metrics.csv", b"step,loss\n1,0.5\n2\n3,0.4\n", "metrics.csv is damaged in line 3"),
        ("metrics.csv", "step,loss\n²,0.5\n3,0.4\n".encode(), "metrics.csv is damaged in line 2"),
        ("metrics.csv", b"stop,loss\n1,0.5\n", "metrics.csv is damaged in line 2"),
        ("metrics.csv", b"step,loss\n1,\xff\n2,0.4\n", "cannot read"),
    ],
)
def test_other_files_of_a_run(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "pretrained", run)
    (run / name).write_bytes(content)
    said = refusal(capsys, pretrain, [f"--out={run}", "--resume"])
    assert words in said
    assert name in said
    assert (run / name).read_bytes() == content
