"""Draw how a model reconstructs one window while it is trained."""

import shutil
from typing import Any

import lightning as L
import torch
from torch import Tensor

from spatspark_fast.common.plots import reconstruction_figure, save_figure
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.pretrain.module import SparkPretraining
from spatspark_fast.training.rundir import RunDirectory

__all__ = ["Pictures"]


class Pictures(L.Callback):
    """Draw the reconstruction of a window every so many epochs, always under the same mask.

    Args:
        run: the run directory that the pictures go to
        sample: the window, ``(1, T, H, W)`` in data units
        scale: mm per 5 min of data value 1
        masks: chooses which patches of the window are hidden
        every: epochs between two pictures; 0 draws none by itself
    """

    def __init__(self, run: RunDirectory, sample: Tensor, scale: float, masks: MaskSampler, every: int) -> None:
        self.run = run
        self.sample = sample
        self.scale = scale
        self.grid = masks.draw(sample, masks.ratio, torch.Generator().manual_seed(0))
        self.every = every

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw, if this epoch is one of them."""
        due = self.every and round(pl_module.epochs_done) % self.every == 0
        if trainer.is_global_zero and pl_module.epoch_complete and due:
            self.draw(pl_module)

    def draw(self, module: SparkPretraining) -> None:
        """Draw what the kept model of a training makes of the window by now."""
        model = module.kept
        training = model.training
        device = next(model.parameters()).device
        model.eval()
        made = model.reconstruct(self.sample.to(device), self.grid.to(device)).float().cpu()
        model.train(training)
        epoch = f"{module.epochs_done:g}"
        figure = reconstruction_figure(self.sample[0], self.grid.active[0], made[0], self.scale, f"epoch {epoch}")
        drawn = self.run.pictures / f"epoch-{epoch}.png"
        self.run.write(drawn, lambda path: save_figure(figure, path))
        self.run.write(self.run.picture, lambda path: shutil.copyfile(drawn, path))
