"""What the steps of a training reconstruct: a part of each image, and all of it in the last ones."""

from spatspark_fast.models.geometry import grid_shape
from spatspark_fast.models.macs import count_step
from spatspark_fast.models.masks import decoded_counts, num_visible
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.schedules import Plan

__all__ = ["decode_ratio_at", "describe_decoding"]


def decode_ratio_at(config: PretrainConfig, plan: Plan, step: int) -> float:
    """Return the share of patches that an optimiser ``step`` reconstructs: all of them in the exact finish."""
    return config.model.decode_ratio if step < plan.total_steps - exact_steps(config, plan) else 1.0


def exact_steps(config: PretrainConfig, plan: Plan) -> int:
    """Return how many steps at the end reconstruct whole images whatever the others do."""
    return round(config.trainer.exact_finish * plan.total_steps)


def describe_decoding(config: PretrainConfig, model: SparK, size: tuple[int, int], plan: Plan) -> list[str]:
    """Say what steps reconstruct of images of ``size`` (H, W) pixels, and what that costs; nothing if it is all."""
    share = config.model.decode_ratio
    if share >= 1:
        return []
    shape = grid_shape(size, model.patch)
    patches = shape[0] * shape[1]
    decoded = decoded_counts(model, shape, num_visible(patches, config.mask.ratio), share)
    macs = count_step(model, size, config.mask.ratio, share)
    cost = macs.active("decoder") / macs.decoder
    if len(decoded) == 2:
        rows, columns = decoded
        what = f"a region of {rows} x {columns} of {shape[0]} x {shape[1]} patches"
        around = ", with what is read around it"
    else:
        (rows,), columns = decoded, 1
        what, around = f"{rows} of {patches} patches", ""
    finish = exact_steps(config, plan)
    end = f"; the last {finish} steps reconstruct all" if finish else ""
    return [
        f"A step reconstructs {what} ({rows * columns / patches:.0%} of the image{around} "
        f"{cost:.0%} of the decoder's multiply-adds){end}"
    ]
