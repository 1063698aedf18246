"""What can be chosen by name in the models, and the rules of the mask ratio: once each, and without torch.

Options are read from here, so that ``--help`` is quick.
"""

from typing import Literal

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import check_choice, need

__all__ = [
    "DECODE_RATIO",
    "DecoderKind",
    "DecoderNorm",
    "Freeze",
    "InputScaling",
    "LossOn",
    "MaskSchedule",
    "MaskStrategy",
    "OutputNorm",
    "TranslationKind",
    "check_mask_ratios",
    "check_ratio_of_grid",
]

DecoderKind = Literal["unet", "light"]
"""The decoder: see `spatspark_fast.models.decoder`."""

DecoderNorm = Literal["batch", "group", "layer"]
"""The norm in the blocks of a U-Net: see `spatspark_fast.models.decoder.UNetBlock`."""

InputScaling = Literal["log", "none"]
"""What the encoder sees of the rain: see `spatspark_fast.models.inputs.scale_input`."""

LossOn = Literal["masked", "all"]
"""The patches that the loss of pretraining reads: see `spatspark_fast.models.patch_loss`."""

MaskStrategy = Literal["random", "rain"]
"""Which patches are masked: see `spatspark_fast.models.masks.MaskSampler`."""

MaskSchedule = Literal["constant", "interval", "linear", "cosine"]
"""How the mask ratio goes over training: see `spatspark_fast.models.masks.MaskSampler`."""

TranslationKind = Literal["conv_tanh", "identity", "residual_conv", "attention", "recurrent"]
"""The network between encoder and decoder: see `spatspark_fast.models.translation`."""

OutputNorm = Literal["persistence", "none", "input_patch", "input_smooth"]
"""What the output of a forecaster counts: see `spatspark_fast.models.spatspark.SpatSpark`."""

Freeze = Literal["none", "encoder", "decoder", "both"]
"""The parts of a forecaster that stay as they are: see `spatspark_fast.models.spatspark.SpatSpark.freeze`."""


DECODE_RATIO = 0.5
"""The share of patches that a step with sparse decoding reconstructs in the presets: see docs/decoding.md."""


def check_mask_ratios(ratio: float, ratio_end: float | None, schedule: MaskSchedule) -> None:
    """Raise `UserError` unless a schedule can go from ``ratio`` to ``ratio_end``, both masked shares in [0, 1)."""
    check_choice("mask.schedule", schedule, MaskSchedule)
    share = "give a share of hidden patches of at least 0 and below 1, for example 0.6"
    need(0 <= ratio < 1, "mask.ratio", ratio, share)
    need(ratio_end is None or 0 <= ratio_end < 1, "mask.ratio_end", ratio_end, share)
    if schedule == "constant":
        need(ratio_end in (None, ratio), "mask.ratio_end", ratio_end, "choose a --mask.schedule for it")
        return
    need(ratio_end is not None, "mask.ratio_end", None, f"the schedule {schedule} needs it")
    ordered = schedule != "interval" or (ratio_end is not None and ratio <= ratio_end)
    need(ordered, "mask.ratio_end", ratio_end, f"an interval needs ratio <= ratio_end, and --mask.ratio is {ratio}")


def check_ratio_of_grid(option: str, ratio: float, shape: tuple[int, int], patch: int) -> None:
    """Raise `UserError` unless a ``ratio`` hides a patch of a grid of ``shape`` (Gh, Gw), and leaves another visible.

    ``option`` is where the ratio comes from; ``patch`` is the side of a patch in pixels.
    """
    patches = shape[0] * shape[1]
    if patches == 1:
        raise UserError(
            f"an image of {patch} x {patch} pixels is a single patch, which cannot be hidden and seen at once: give "
            "larger images, or a smaller --model.patch (with fewer --model.levels)"
        )
    visible = round(patches * (1 - ratio))
    if 0 < visible < patches:
        return
    what, nearest = ("hides none", 1) if visible else ("leaves none visible", patches - 1)
    raise UserError(
        f"--{option} is {ratio}: of {shape[0]} x {shape[1]} patches it {what}; the nearest ratio that can be is "
        f"{nearest / patches:.6g}, {nearest} of {patches} hidden"
    )
