"""How large and how often: ``--scale tiny`` (a test), ``quick`` (the default) or ``full``, on either device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .device import device

__all__ = ["MASKED", "NAMES", "Scale", "scale_of"]

NAMES = ("tiny", "quick", "full")
MASKED = 0.6  # hidden share of the patches where a suite does not vary it


@dataclass(frozen=True)
class Scale:
    """Sizes and rounds of the suites.

    Attributes:
        layer_batch, layer_rounds: images and rounds of a single layer; ``layer_side`` patches along an image.
        batch: images of an encoder or a step.
        size, frames: pixels along a window, and its frames.
        width, light: channels of the U-Net's and of the light decoder.
        encoders: of ``encoder``; ``step_encoders`` of ``step``.
        masked: hidden shares of ``encoder``; ``sweep`` those of ``mask_sweep``.
        rounds, step_rounds, sweep_rounds: of encoders, steps and the sweep.
        levels: the first stages of a ResNet that layers are taken from.
        compiled: ways of the step that run compiled, too.
        images: encoder, pixels and channels of the step whose images/s are measured; None leaves it out.
        copy_bytes, matrix_side: of the copy and the square product that measure the ceilings of the device; the copy
            is several times as large as the last cache.
    """

    device: torch.device
    layer_batch: int = 8
    layer_side: int = 9
    layer_rounds: int = 11
    levels: int = 4
    batch: int = 4
    size: int = 288
    frames: int = 12
    width: int = 768
    light: int = 512
    encoders: tuple[str, ...] = ("resnet18", "resnet50", "convnext_tiny")
    step_encoders: tuple[str, ...] = ("resnet18",)
    masked: tuple[float, ...] = (MASKED,)
    sweep: tuple[float, ...] = (0.0, 0.3, 0.6, 0.75, 0.9)
    rounds: int = 3
    step_rounds: int = 3
    sweep_rounds: int = 3
    compiled: tuple[str, ...] = ()
    images: tuple[str, int, int] | None = None
    copy_bytes: int = 2**28
    matrix_side: int = 1536

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def for_encoder(self, encoder: str) -> Scale:
        """Return the scale of one encoder: on a GPU, half the batch for those larger than a ResNet-18."""
        return replace(self, batch=self.batch // 2) if self.cuda and encoder != "resnet18" else self

    @property
    def precision(self) -> torch.dtype:
        """Type that our steps compute in; the published way is float32."""
        return torch.bfloat16 if self.cuda else torch.float32


def scale_of(name: str, where: torch.device | None = None) -> Scale:
    """Return the sizes of a scale on a device; raise ValueError for a name that is not one."""
    where = device() if where is None else where
    if name not in NAMES:
        raise ValueError(f"scale {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if name == "tiny":
        return Scale(
            where, 1, 3, 2, 1, batch=2, size=96, frames=2, width=32, light=32, encoders=("test_resnet",),
            step_encoders=("test_resnet",), sweep=(0.0, 0.6), rounds=2, step_rounds=2, sweep_rounds=2,
            images=("test_resnet", 64, 3), copy_bytes=2**22, matrix_side=128,
        )  # fmt: skip
    found = Scale(where)
    if where.type == "cuda":
        found = replace(
            found, layer_batch=128, layer_rounds=11, batch=128, rounds=7, step_rounds=7, sweep_rounds=7,
            encoders=("resnet18", "resnet50", "convnext_base"), step_encoders=("resnet18", "resnet50", "convnext_base"),
            compiled=("dense",), images=("resnet50", 224, 3), copy_bytes=2**32, matrix_side=8192,
        )  # fmt: skip
    if name == "full":
        found = replace(
            found, masked=(0.3, 0.6, 0.75), sweep=(0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
            layer_rounds=21, rounds=max(found.rounds, 7), step_rounds=max(found.step_rounds, 5),
            sweep_rounds=max(found.sweep_rounds, 5),
        )  # fmt: skip
        if where.type == "cuda":
            found = replace(found, compiled=("dense", "exact", "sparse", "light"))
    return found
