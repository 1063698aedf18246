"""The pretraining step as a Lightning module: every random choice follows from (seed, position) alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spatspark_fast.common.options import to_plain
from spatspark_fast.models.masks import MaskSampler, draw_masks, grids_of
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.average import averaged
from spatspark_fast.training.captured import Inputs
from spatspark_fast.training.module import PlannedTraining, compile_parts
from spatspark_fast.training.schedules import Plan

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
        share, position, rank = self.config.model.decode_ratio, self.position, self.global_rank
        draw = draw_masks(self.spark, self.masks, tuple(frames.shape), share, position, progress, rank)
        counts, what = (draw.visible,), f"{draw.visible} patches of a window visible"
        if draw.decoded is not None:
            counts, what = (*counts, draw.decoded), f"{what}, {draw.decoded} reconstructed"
        return Inputs(frames, draw.noise, counts, what)

    def loss(self, frames: Tensor, noise: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
        """Return the loss of one batch under its masks."""
        visible, *decoded = counts
        grids = grids_of(self.spark, self.masks, frames, visible, decoded[0] if decoded else None, noise)
        return self.spark(frames, *grids).loss

    def extra_row(self) -> dict[str, float | Tensor]:
        """Return the mask ratio of the newest batch."""
        progress = self.plan.progress(self.plan.step_of(self.position))
        return {"mask_ratio": self.masks.ratio_at(progress, self.position)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the options, as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = to_plain(self.config)
