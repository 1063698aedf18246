"""What can be chosen by name in the models, once each. Nothing heavy is imported, so that ``--help`` is quick."""

from typing import Literal

__all__ = [
    "DecoderKind",
    "Freeze",
    "InputScaling",
    "LossOn",
    "MaskSchedule",
    "MaskStrategy",
    "OutputNorm",
    "TranslationKind",
]

DecoderKind = Literal["unet", "light"]
"""The decoder: see `spatspark_fast.models.decoder`."""

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
