"""A finetuning that was stopped goes on as if nothing had happened; one that stopped early says so."""

import os
import signal
from pathlib import Path

import pytest
import torch

from spatspark_fast.finetune.validation import Validation
from spatspark_fast.training.metrics import MetricsCsv

from ..matrix import rest_but
from ..pretrain.runs import checkpoint, pretrain, rows, same, same_training
from .runs import finetune


@pytest.fixture(autouse=True)
def unmoved_signals() -> object:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert before == {signum: signal.getsignal(signum) for signum in before}, "a signal was not given back"


@pytest.mark.parametrize(
    ("step", "encoder"),
    rest_but([(4, "test_resnet"), (6, "test_resnet")], [(4, "test_resnet"), (6, "test_resnet"), (6, "resnet10t")]),
)
def test_a_signal_saves_and_resume_is_bitwise_exact(
    step: int, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 ends an epoch, step 6 lies within one."""
    changes = {"model__encoder": encoder, "optim__ema": 0.5, "data__num_workers": 0}
    assert finetune(tmp_path / "whole", **changes) == 0
    log = MetricsCsv.log_metrics

    def log_and_stop(self: MetricsCsv, metrics: dict[str, float], at: int | None = None) -> None:
        log(self, metrics, at)
        if at == step and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCsv, "log_metrics", log_and_stop)
        assert finetune(tmp_path / "cut", **changes) == 143
    assert checkpoint(tmp_path / "cut")["global_step"] == step
    assert finetune(tmp_path / "cut", "--resume", **changes) == 0
    assert f"Going on after step {step}" in capsys.readouterr().out
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    assert same_training(whole, cut)
    assert same(whole["callbacks"]["Validation"], cut["callbacks"]["Validation"])
    assert rows(tmp_path / "whole", times=False) == rows(tmp_path / "cut", times=False)
    best = [torch.load(tmp_path / name / "checkpoints" / "best.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert same(best[0]["state_dict"], best[1]["state_dict"])


def test_resume_keeps_pretrained_weights_out_and_reads_them_no_more(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "pretrained", trainer__epochs=1) == 0
    init = tmp_path / "pretrained" / "checkpoints" / "last.ckpt"
    assert finetune(tmp_path / "run", init=init, trainer__max_steps=2) == 0
    init.unlink()
    assert finetune(tmp_path / "run", "--resume", init=init, trainer__max_steps=5) == 0
    assert checkpoint(tmp_path / "run")["global_step"] == 5
    assert checkpoint(tmp_path / "run")["config"]["init"] == str(init)


def test_patience_ends_a_run_early_and_the_best_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter([0.5, 0.4, 0.2, 0.3, 0.25, 0.3, 0.1, 0.1, 0.1])

    def score(self: Validation, trainer: object, model: object) -> dict[str, float]:
        mse = next(scores)
        return {"mse": mse, "csi@0.5": 0.0, "csi@1": 0.0}

    monkeypatch.setattr(Validation, "_score", score)
    out = tmp_path / "run"
    # The first score is that of persistence.
    assert finetune(out, trainer__patience=2, trainer__epochs=9) == 0
    shown = capsys.readouterr().out
    assert "No better score in 2 validations: stopping early, the best was epoch 2" in shown
    assert "Best checkpoint: epoch 2, validation: MSE [(mm/5min)^2] 0.2000" in shown
    assert checkpoint(out)["global_step"] == 16
    assert torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 2
    assert finetune(out, "--resume", trainer__patience=2, trainer__epochs=9) == 0
    shown = capsys.readouterr().out
    assert "is complete, at step 16: it stopped early after 2 validations without a better score" in shown
    assert finetune(out, "--resume", trainer__patience=3, trainer__epochs=9) == 0
    assert checkpoint(out)["global_step"] > 16


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert finetune(out, trainer__epochs=2) == 0
    cases = [
        (["--resume", "--model.translation=identity", "--trainer.epochs=5"], "is of another model: model.translation"),
        (["--resume", "--init=other.ckpt", "--trainer.epochs=5"], "leave --init out"),
        ([], "already holds a run"),
        ([f"--resume={out / 'checkpoints' / 'best.ckpt'}"], "lacks the options or the position"),
    ]
    capsys.readouterr()
    for more, words in cases:
        assert finetune(out, *more, trainer__epochs=2) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    assert pretrain(tmp_path / "pretrained", trainer__epochs=1) == 0
    assert finetune(tmp_path / "new", f"--resume={tmp_path / 'pretrained' / 'checkpoints' / 'last.ckpt'}") == 2
    assert "start from it by --init" in capsys.readouterr().err
