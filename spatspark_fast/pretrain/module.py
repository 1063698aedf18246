"""The pretraining step as a Lightning module: every random choice follows from (seed, position) alone."""

from typing import Any

from torch import Tensor

from spatspark_fast.common.options import to_plain
from spatspark_fast.models.masks import MaskSampler, patches_to_decode
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.module import PlannedTraining, averaged
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
        if config.trainer.compile != "off":
            # Part by part, in place: the keys of the weights stay, and what chooses the grid stays outside.
            for part in (spark.encoder, spark.densify, spark.decoder):
                part.compile(mode=config.trainer.compile)

    @property
    def trained(self) -> SparK:
        """Return the model whose weights are trained."""
        return self.spark

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch under the masks of its position."""
        frames = batch["input"]
        progress = self.plan.progress(self.plan.step_of(self.position))
        grid = self.masks(frames, step=self.position, progress=progress, rank=self.global_rank)
        share = self.config.model.decode_ratio
        decoded = patches_to_decode(self.spark, self.masks, grid, share, self.position, self.global_rank)
        return self.watch(self.spark(frames, grid, decoded).loss)

    def extra_row(self) -> dict[str, float | Tensor]:
        """Return the mask ratio of the newest batch."""
        progress = self.plan.progress(self.plan.step_of(self.position))
        return {"mask_ratio": self.masks.ratio_at(progress, self.position)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the options, as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = to_plain(self.config)
