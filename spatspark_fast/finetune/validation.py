"""Score a forecaster on held-out windows while it is trained; keep the best one; stop when it gets no better."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from spatspark_fast.common.units import mm_per_hour
from spatspark_fast.data.reader import Reader
from spatspark_fast.data.resident.places import Place
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.finetune.config import Score
from spatspark_fast.finetune.module import ForecastTraining
from spatspark_fast.models.forecaster import Forecaster, Persistence
from spatspark_fast.scores.nowcast import NowcastScores
from spatspark_fast.training.checkpoints import AtomicCheckpointIO

__all__ = ["THRESHOLDS", "Validation", "score_model"]

THRESHOLDS = (0.5, 1.0)  # mm/h


@torch.no_grad()
def score_model(
    model: Forecaster, batches: Iterator[Tensor], scale: float, size: tuple[int, int], device: torch.device
) -> dict[str, float]:
    """Return ``mse`` in (mm/5min)^2 and ``csi@0.5``, ``csi@1`` (mm/h) over all lead times and pixels with data.

    All devices of a distributed run must call it, and all get the scores of the whole.
    """
    scores = NowcastScores(model.out_length, size, THRESHOLDS, fss_scales=(), spectrum=False, scale=scale).to(device)
    for batch in batches:
        frames = batch.to(device)
        forecast = model.predict(frames[:, : model.in_length]).float()
        scores.update(mm_per_hour(forecast, scale), mm_per_hour(frames[:, model.in_length :], scale))
    found = scores.compute()["all"]
    return {"mse": found["pmse"]} | {f"csi@{t:g}": found[f"csi@{t:g}"] for t in THRESHOLDS}


class Validation(L.Callback):
    """Validate every so many epochs, keep the best checkpoint, and stop training when nothing gets better.

    A better score writes ``best_path``; ``patience`` validations without one end the training. The windows with
    these ``numbers`` come from ``place``, which reads the file; set it to a faster one where there is one.
    ``newest``, ``best`` and ``persistence`` hold scores of `score_model`; all is part of a checkpoint, so a resumed
    run knows its best.
    """

    def __init__(
        self,
        windows: WholeWindows,
        numbers: Sequence[int],
        best_path: Path,
        console: Console,
        every: int = 1,
        score: Score = "mse",
        patience: int = 0,
        batch_size: int = 16,
    ) -> None:
        self.windows = windows
        self.numbers = numbers
        self.place: Place = Reader(windows)
        self.best_path = best_path
        self.console = console
        self.every = every
        self.score = score
        self.patience = patience
        self.batch_size = batch_size
        self.newest: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.persistence: dict[str, float] = {}
        self.best_epoch = 0.0
        self.since_best = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        names = ("newest", "best", "persistence", "best_epoch", "since_best", "score")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier state; the best by another score is no best."""
        for name in ("newest", "persistence"):
            setattr(self, name, state_dict[name])
        if state_dict["score"] == self.score:
            for name in ("best", "best_epoch", "since_best"):
                setattr(self, name, state_dict[name])

    @property
    def exhausted(self) -> bool:
        """Tell whether patience is at its end."""
        return bool(self.patience) and self.since_best >= self.patience

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate at the last step, if that lies within an epoch; the checkpoint that follows knows of it."""
        module = cast(ForecastTraining, pl_module)
        if module.between_steps and not module.epoch_complete and trainer.global_step >= module.plan.total_steps:
            self._validate(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate, if this epoch is one of them or the last."""
        module = cast(ForecastTraining, pl_module)
        final = trainer.global_step >= module.plan.total_steps
        if module.epoch_complete and (final or round(module.epochs_done) % self.every == 0):
            self._validate(trainer, module)
            trainer.should_stop = trainer.should_stop or self.exhausted

    def _validate(self, trainer: L.Trainer, module: ForecastTraining) -> None:
        if not self.persistence:
            # Always something to compare with, and what the best has to beat.
            still = Persistence(module.model.in_length, module.model.out_length)
            self.persistence = self._score(trainer, still)
        model = module.kept
        training = model.training
        model.eval()
        try:
            with trainer.strategy.precision_plugin.forward_context():
                self.newest = self._score(trainer, model)
        finally:
            model.train(training)
        better = self._better()
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.best, self.best_epoch = self.newest, module.epochs_done
        self._record(trainer, module, better)

    def _score(self, trainer: L.Trainer, model: Forecaster) -> dict[str, float]:
        keys = [(0, number) for number in self.numbers[trainer.global_rank :: trainer.world_size]]
        parts = [keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)]
        batches, device = self.place.batches(parts), trainer.strategy.root_device
        return score_model(model, batches, self.windows.scale, self.windows.image_size, device)

    def _better(self) -> bool:
        name, sign = ("mse", -1) if self.score == "mse" else ("csi@1", 1)
        best = self.best.get(name, math.nan)
        # CSI is NaN where it rains neither in forecast nor observation: anything is better than that.
        return math.isnan(best) or sign * self.newest[name] > sign * best

    def _record(self, trainer: L.Trainer, module: ForecastTraining, better: bool) -> None:
        row = {"validation_" + name.replace("@", "_"): value for name, value in self.newest.items()}
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": module.epochs_done, **row}, trainer.global_step)
        if not trainer.is_global_zero:
            return
        if better:
            about = {"epoch": module.epochs_done, "global_step": trainer.global_step, "validation": self.newest}
            AtomicCheckpointIO().save_checkpoint(module.exported() | about, self.best_path)
        self.console.print(
            f"  {self.describe()}{', the best so far' if better else ''}", soft_wrap=True, highlight=False
        )
        if self.exhausted:
            self.console.print(
                f"No better score in {self.since_best} validations: stopping early, the best was epoch "
                f"{self.best_epoch:.4g}",
                soft_wrap=True,
                highlight=False,
            )

    def describe(self, scores: dict[str, float] | None = None) -> str:
        """Say scores, the newest unless given, beside those of persistence."""
        scores = self.newest if scores is None else scores
        titles = {"mse": "MSE [(mm/5min)^2]"}
        words = (
            f"{titles.get(name, name.upper() + ' mm/h')} {value:.4f} (persistence {self.persistence[name]:.4f})"
            for name, value in scores.items()
        )
        return "validation: " + ", ".join(words)
