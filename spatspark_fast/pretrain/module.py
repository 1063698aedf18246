"""The pretraining step as a Lightning module: every random choice follows from (seed, position) alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spatspark_fast.common.options import to_plain
from spatspark_fast.models.masks import MaskDraw, MaskSampler, draw_masks, grids_of
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.pretrain.decoding import decode_ratio_at
from spatspark_fast.training.average import averaged
from spatspark_fast.training.captured import Inputs
from spatspark_fast.training.module import PlannedTraining, compile_parts
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.statistics import enough_values

__all__ = ["SparkPretraining"]


class SparkPretraining(PlannedTraining[SparK]):
    """Train a `SparK` model under masks that follow from the position of a batch."""

    def __init__(self, config: PretrainConfig, spark: SparK, masks: MaskSampler, plan: Plan) -> None:
        super().__init__(config.optim, config.trainer.seed, plan)
        self.config = config
        self.spark = spark
        self.masks = masks
        self.ema = averaged(spark, config.optim.ema)
        # Part by part: what chooses the grid stays outside.
        compile_parts((spark.encoder, spark.densify, spark.decoder), config.trainer.compile)

    @property
    def trained(self) -> SparK:
        """Return the model whose weights are trained."""
        return self.spark

    def inputs(self, batch: dict[str, Any]) -> Inputs:
        """Return the frames of a batch, and the masks of its position as random numbers and counts."""
        frames = batch["input"]
        progress = self.plan.progress(self.plan.step_of(self.position))
        position, rank = self.position, self.global_rank
        draw = draw_masks(self.spark, self.masks, tuple(frames.shape), self._share(), position, progress, rank)
        return Inputs(frames, draw.noise, (draw.visible, *draw.decoded), _in_words(draw))

    def loss(self, frames: Tensor, noise: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
        """Return the loss of one batch under its masks."""
        visible, *decoded = counts
        grids = grids_of(self.spark, self.masks, frames, visible, decoded, noise)
        with enough_values(len(frames)):
            return self.spark(frames, *grids).loss

    def _share(self) -> float:
        """Return the share of patches that the newest batch reconstructs."""
        return decode_ratio_at(self.config, self.plan, self.plan.step_of(self.position))

    def extra_row(self) -> dict[str, float | Tensor]:
        """Return the mask ratio of the newest batch."""
        progress = self.plan.progress(self.plan.step_of(self.position))
        return {"mask_ratio": self.masks.ratio_at(progress, self.position)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the options, as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = to_plain(self.config)


def _in_words(draw: MaskDraw) -> str:
    """Say what decides the shapes of a step."""
    decoded = {0: "", 1: ", {} reconstructed", 2: ", a region of {} x {} reconstructed"}[len(draw.decoded)]
    return f"{draw.visible} patches of a window visible{decoded.format(*draw.decoded)}"
