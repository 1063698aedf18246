"""SparK for radar: pretrain a convolutional encoder by reconstructing the patches that it did not see.

The path of the data, one line each in `SparK.forward`::

    frames (B, T, H, W) --pack--> packed (N, T, p, p)        only visible patches, T frames as channels
                        --encode--> features [(N, C, p/s, p/s)]   strides s = 4, 8, 16, 32
                        --densify--> densified [(B, W, H/s, W/s)] mask tokens where nothing was seen
                        --decoder--> reconstruction (B, T, H, W)  in patch-normalised units
                        --loss--> scalar                          on the masked patches
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, bind, pack
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import check_choice
from spatspark_fast.models.backbones import build_encoder, encoder_channels
from spatspark_fast.models.choices import DecoderKind, DecoderNorm, InputScaling, LossOn
from spatspark_fast.models.decoder import LightDecoder, UNetDecoder, build_decoder
from spatspark_fast.models.densify import Densify, NormKind
from spatspark_fast.models.geometry import check_patch, grid_shape
from spatspark_fast.models.inputs import scale_input
from spatspark_fast.models.patch_loss import (
    decoded_loss,
    denormalise_patches,
    patch_statistics,
    reconstruction_loss,
    region_loss,
)
from spatspark_fast.models.region import LevelExtents, Region

__all__ = ["Observer", "SparK", "SparKOutput", "build_spark"]


class SparKOutput(NamedTuple):
    """Hold the scalar ``loss`` and the ``prediction`` ``(B, T, H, W)`` in patch-normalised units.

    Of a region it is ``(B, T, rows * patch, columns * patch)``, of masked patches alone ``(M, T, patch, patch)``.
    """

    loss: Tensor
    prediction: Tensor


class Observer:
    """Hear where the parts of `SparK.forward` begin and end; this one does nothing, a clock overrides it.

    `SparK.forward` calls it between its parts, so a compiled encoder or decoder never sees it.
    """

    def started(self) -> None:
        """Hear that the forward pass begins."""

    def encoded(self, features: list[Tensor]) -> list[Tensor]:
        """Hear that the encoder has ended; return ``features``, or aliases of them, for the decoder to read."""
        return features

    def decoded(self) -> None:
        """Hear that decoder and loss have ended."""


class SparK(nn.Module):
    """Reconstruct masked patches of radar windows from the visible ones (SparK, arXiv 2301.03580).

    Build one with `build_spark`. Masks come from outside as a grid, so the model holds no random state. Where
    nothing is masked, `encode_dense` and `forward_dense` run the same parameters as an ordinary dense
    network. Set ``observer`` to learn where the parts of `forward` begin and end.
    """

    def __init__(
        self,
        encoder: nn.Module,
        densify: Densify,
        decoder: UNetDecoder | LightDecoder,
        in_chans: int,
        patch: int = 32,
        loss_on: LossOn = "masked",
        backend: str = "auto",
        input_scaling: InputScaling = "none",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.densify = densify
        self.decoder = decoder
        self.in_chans = in_chans
        self.patch = patch
        self.loss_on: LossOn = loss_on
        self.backend = backend
        self.input_scaling: InputScaling = input_scaling
        self.observer = Observer()

    def forward(self, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None = None) -> SparKOutput:
        """Return loss and prediction for ``frames`` ``(B, T, H, W)`` (data units), seen where ``grid`` is active.

        With ``decoded`` only a part is reconstructed, and the loss is that of this part (see docs/decoding.md): by the
        U-Net a region, by the light decoder a set of patches, masked ones unless the loss reads all.

        Raises UserError if the frames, the grid and the model do not fit together.
        """
        self.observer.started()
        self._check(frames, grid, decoded)
        packed = pack(frames, grid)
        features = self.observer.encoded(self.encode(packed, grid))
        densified = self.densify(features, grid, self.levels_of(decoded), self.backend)
        prediction = self.decoder(densified, decoded, self.backend)
        loss = self._loss(prediction, frames, grid, decoded)
        self.observer.decoded()
        return SparKOutput(loss, prediction)

    def _loss(self, prediction: Tensor, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None) -> Tensor:
        if decoded is None:
            return reconstruction_loss(prediction, frames, grid, self.loss_on)
        if isinstance(decoded, Region):
            return region_loss(prediction, frames, grid, decoded, self.loss_on)
        return decoded_loss(prediction, pack(frames, decoded), decoded, self.loss_on)

    def levels_of(self, decoded: Region | PatchGrid | None) -> list[LevelExtents] | None:
        """Return what the decoder reads of each densified map to reconstruct a region; None for whole images."""
        if isinstance(decoded, Region) and isinstance(self.decoder, UNetDecoder):
            return self.decoder.levels_of(decoded)
        return None

    def encode(self, packed: Tensor, grid: PatchGrid) -> list[Tensor]:
        """Return packed features ``(N, C, p/s, p/s)``, shallow to deep, of ``packed`` ``(N, T, p, p)`` (data units)."""
        with bind(self.encoder, grid):
            return list(self.encoder(scale_input(packed, self.input_scaling)))

    def encode_dense(self, frames: Tensor) -> list[Tensor]:
        """Return features ``(B, C, H/s, W/s)``, shallow to deep, of whole images, by dense layers."""
        return list(self.encoder(scale_input(frames, self.input_scaling)))

    def forward_dense(self, frames: Tensor) -> Tensor:
        """Return the decoder's output ``(B, T, H, W)`` for whole images, by ordinary dense layers only."""
        return self.decoder(self.densify(self.encode_dense(frames)))

    @property
    def decodes_regions(self) -> bool:
        """Whether sparse decoding reconstructs a region of each image (U-Net) or patches one by one (light)."""
        return isinstance(self.decoder, UNetDecoder)

    @property
    def decodes_apart(self) -> bool:
        """Whether leaving out patches that the loss does not read changes nothing but the cost of a step.

        The light decoder draws each patch by itself, and with ``loss_on="masked"`` visible ones do not count.
        """
        return isinstance(self.decoder, LightDecoder) and self.loss_on == "masked"

    @torch.no_grad()
    def reconstruct(self, frames: Tensor, grid: PatchGrid, keep_visible: bool = True) -> Tensor:
        """Return the prediction ``(B, T, H, W)`` in data units, by the true mean and variance of each patch.

        With ``keep_visible`` the visible patches are copied from ``frames``; without it they are predicted
        too, as every patch is. Runs in the mode the model is in: call ``eval()`` before, or batch statistics
        move.
        """
        prediction = self(frames, grid).prediction.to(frames.dtype)
        pictures = denormalise_patches(prediction, patch_statistics(frames, grid.shape))
        if not keep_visible:
            return pictures
        return torch.where(grid.pixels(frames.shape[2:]).unsqueeze(1), frames, pictures)

    def _check(self, frames: Tensor, grid: PatchGrid, decoded: Region | PatchGrid | None) -> None:
        if frames.ndim != 4 or frames.shape[1] != self.in_chans:
            need = f"(B, {self.in_chans}, H, W)"
            raise UserError(f"frames must be {need} for this model, got {tuple(frames.shape)}")
        expected = (frames.shape[0], *grid_shape(frames.shape[2:], self.patch))
        if tuple(grid.active.shape) != expected:
            raise UserError(
                f"the grid is {tuple(grid.active.shape)} (images, rows, columns), but frames "
                f"{tuple(frames.shape)} in patches of {self.patch} need {expected}"
            )
        if isinstance(decoded, Region):
            self._check_region(decoded, expected)
        elif decoded is not None:
            self._check_patches(decoded, grid)
        if self.training:
            self.check_visible(grid.num_active)

    @staticmethod
    def check_visible(patches: int) -> None:
        """Raise UserError unless a batch with so many visible ``patches`` can be trained on."""
        if patches < 2:
            raise UserError(
                f"{patches} visible patch in a batch gives a norm no statistics to train with: "
                "take a larger batch, a larger image or a lower mask ratio"
            )

    def _check_region(self, decoded: Region, expected: tuple[int, ...]) -> None:
        if not self.decodes_regions:
            raise UserError("the light decoder draws patches one by one: give it the grid of those to reconstruct")
        found = (len(decoded.first), *decoded.grid)
        if found != expected or decoded.patch != self.patch:
            raise UserError(
                f"the region is one of grids {found} (images, rows, columns) of patches of {decoded.patch} pixels, the "
                f"frames have {expected} of {self.patch}: make it with the same numbers"
            )

    def _check_patches(self, decoded: PatchGrid, grid: PatchGrid) -> None:
        if self.decodes_regions:
            raise UserError("the U-Net reconstructs whole images or a region, not a grid of patches: see draw_region")
        if decoded.active.shape != grid.active.shape or decoded.num_active == 0:
            raise UserError(
                f"the decoded patches are {decoded.num_active} of {tuple(decoded.active.shape)}, the grid is "
                f"{tuple(grid.active.shape)}: choose at least one patch of the same grid"
            )


def build_spark(
    encoder: str = "resnet18",
    in_chans: int = 12,
    patch: int = 32,
    decoder: DecoderKind = "unet",
    decoder_width: int = 768,
    loss_on: LossOn = "masked",
    backend: str = "auto",
    levels: int = 4,
    densify_norm: NormKind | Literal["auto"] = "auto",
    decoder_norm: DecoderNorm = "batch",
    input_scaling: InputScaling = "none",
) -> SparK:
    """Build a SparK model around the timm model ``encoder``.

    ``patch`` is the side of a masked patch in pixels, a multiple of the deepest stride: 32 with all four
    ``levels``, 16 with three, 8 with two (the encoder is cut off after them). ``in_chans`` is the number of
    frames. ``densify_norm`` is ``batch`` for encoders with BatchNorm and ``layer`` for others, unless given.
    ``decoder_norm`` is that of a U-Net's blocks; ``input_scaling`` is what the encoder sees of the rain, see
    `spatspark_fast.models.inputs.scale_input`. ``batch`` and ``none`` are the published model.
    The image size is not fixed: any multiple of the patch, rectangular or not. Kernels lie in channels_last memory, as
    engines read them and leave their gradients. Raises UserError for values that do not fit.
    """
    check_patch(patch, levels)
    check_choice("input_scaling", input_scaling, InputScaling)
    check_choice("loss_on", loss_on, LossOn)
    body = build_encoder(encoder, in_chans, backend, levels)
    if densify_norm == "auto":
        densify_norm = "batch" if any(isinstance(m, nn.BatchNorm2d) for m in body.modules()) else "layer"
    head = build_decoder(decoder, in_chans, decoder_width, levels, decoder_norm)
    densify = Densify(encoder_channels(body), head.in_widths, densify_norm)
    model = SparK(body, densify, head, in_chans, patch, loss_on, backend, input_scaling)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
