"""SpaT-SparK on the dense path: forecast whole images with what pretraining made of encoder and decoder.

The path of the data, one line each in `SpatSpark.forward`; nothing is masked and no sparse engine is needed::

    frames (B, T_in, H, W) --encode--> features [(B, C, H/s, W/s)]     strides s = 4, 8, 16, 32
                           --translate--> features of the same shapes  past to future
                           --densify--> [(B, W, H/s, W/s)]             norm and projection; no mask token is used
                           --decoder--> prediction (B, T_out, H, W)
                           --output norm--> forecast (B, T_out, H, W)  data units
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import check_choice
from spatspark_fast.models.backbones import build_dense_encoder, encoder_channels
from spatspark_fast.models.choices import DecoderKind, DecoderNorm, Freeze, InputScaling, OutputNorm, TranslationKind
from spatspark_fast.models.decoder import LightDecoder, UNetDecoder, build_decoder
from spatspark_fast.models.densify import Densify, NormKind
from spatspark_fast.models.forecaster import Forecaster, check_lengths
from spatspark_fast.models.geometry import check_patch, grid_shape
from spatspark_fast.models.inputs import scale_input
from spatspark_fast.models.patch_loss import denormalise_patches, patch_statistics
from spatspark_fast.models.translation import Translation, build_translation

__all__ = ["SpatSpark", "build_spatspark"]

HEAD = "decoder.head."


class SpatSpark(Forecaster):
    """Forecast rain by encoder, translation network and decoder (SpaT-SparK, arXiv 2412.15917).

    Build one with `build_spatspark`. Encoder, densify and decoder have the parameter names of
    `spatspark_fast.models.spark.SparK`, so its weights fit.

    ``output_norm="input_patch"`` reads the decoder's output in units of the input: multiplied by the standard
    deviation and shifted by the mean that the same patch has over the input frames. A pretrained decoder draws
    in such units, and the published code of SpaT-SparK does the same; edges of patches show until training has
    learned to undo them. ``"input_smooth"`` interpolates mean and deviation between the centres of patches, so that
    there are no edges. With ``"none"`` the output counts ``unit`` data units. ``"persistence"`` adds it, in the same
    units, to the newest frame, and the decoder's head begins at 0: the model starts as persistence and learns
    what changes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        translation: Translation,
        densify: Densify,
        decoder: UNetDecoder | LightDecoder,
        in_length: int,
        out_length: int,
        patch: int = 32,
        output_norm: OutputNorm = "none",
        unit: float = 1.0,
        input_scaling: InputScaling = "none",
    ) -> None:
        super().__init__(in_length, out_length, multiple=patch)
        check_choice("output_norm", output_norm, OutputNorm)
        self.encoder = encoder
        self.translation = translation
        self.densify = densify
        self.decoder = decoder
        self.patch = patch
        self.output_norm: OutputNorm = output_norm
        self.unit = unit
        self.input_scaling: InputScaling = input_scaling
        if output_norm == "persistence":
            decoder.head.apply(_zero)
        self._frozen: tuple[nn.Module, ...] = ()
        for name, parameter in self.densify.named_parameters():
            if name.endswith("mask_token"):  # nothing is masked here
                parameter.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``frames`` ``(B, in_length, H, W)`` to ``(B, out_length, H, W)``, both in data units.

        Raises UserError unless the frames fit the model.
        """
        self.check(frames)
        features = list(self.encoder(scale_input(frames, self.input_scaling)))
        densified = self.densify(self.translation(features))
        prediction = self.decoder(densified).to(frames.dtype)
        if self.output_norm == "none":
            return prediction * self.unit
        if self.output_norm == "persistence":
            return frames[:, -1:] + prediction * self.unit
        statistics = patch_statistics(frames, grid_shape(frames.shape[2:], self.patch))
        if self.output_norm == "input_patch":
            return denormalise_patches(prediction, statistics)
        mean, std = (_smooth(value, frames) for value in statistics)
        return prediction * std + mean

    def load_pretrained(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of a `SparK` with the same parts; return the names of those that stay as they were.

        These are the decoder's head, if it draws another number of frames, or changes instead of rain
        (``output_norm="persistence"``). The translation network is always new and not named. Raises UserError,
        naming the first weight that does not fit.
        """
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("translation.")}
        new = self.output_norm == "persistence"
        kept = [name for name in own if name.startswith(HEAD) and (new or _differs(weights.get(name), own[name]))]
        for name, value in own.items():
            if name not in kept and _differs(weights.get(name), value):
                found = "missing" if name not in weights else str(tuple(weights[name].shape))
                raise UserError(
                    f"the pretrained weights do not fit this model: {name} is {found}, not {tuple(value.shape)}; "
                    "encoder, input length, patch, levels and decoder must be those of pretraining"
                )
        self.load_state_dict({name: weights[name] for name in own if name not in kept}, strict=False)
        return kept

    def freeze(self, parts: Freeze, except_head: bool = False) -> None:
        """Keep the ``encoder``, the ``decoder`` (with densify) or ``both`` as they are during training.

        Their norms then stay in evaluation mode, also after ``train()``. With ``except_head`` the decoder's last layer
        is trained all the same: it has to be if it was not pretrained. Raises UserError if nothing is left to train.
        """
        check_choice("freeze", parts, Freeze)
        frozen: list[nn.Module] = [self.encoder] if parts in ("encoder", "both") else []
        frozen += [self.densify, self.decoder] if parts in ("decoder", "both") else []
        for module in frozen:
            module.requires_grad_(False)
        if except_head:
            self.decoder.head.requires_grad_(True)
        self._frozen = tuple(frozen)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(
                f"freeze {parts} leaves nothing to train, since the translation network 'identity' has no weights: "
                "take another translation, or freeze less"
            )
        self.train(self.training)

    def train(self, mode: bool = True) -> SpatSpark:
        """Set the mode of all parts that are not frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def _zero(module: nn.Module) -> None:
    """Set weight and bias of a convolution to 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.zeros_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _smooth(values: Tensor, frames: Tensor) -> Tensor:
    """Interpolate ``(B, 1, Gh, 1, Gw, 1)``, one value for each patch, to the pixels ``(B, 1, H, W)``."""
    return F.interpolate(values[:, :, :, 0, :, 0], size=frames.shape[2:], mode="bilinear", align_corners=False)


def _differs(found: Tensor | None, own: Tensor) -> bool:
    return found is None or found.shape != own.shape


def build_spatspark(
    encoder: str = "resnet18",
    in_length: int = 12,
    out_length: int = 12,
    patch: int = 32,
    levels: int = 4,
    decoder: DecoderKind = "unet",
    decoder_width: int = 768,
    translation: TranslationKind = "conv_tanh",
    output_norm: OutputNorm = "none",
    unit: float = 1.0,
    input_scaling: InputScaling = "none",
    decoder_norm: DecoderNorm = "batch",
) -> SpatSpark:
    """Build a dense SpaT-SparK around the timm model ``encoder``.

    ``in_length`` and ``out_length`` count frames of 5 minutes. Height and width of the images may be any multiples
    of ``patch`` (pixels). ``translation="identity"`` is SparK without translation. Raises UserError for values that do
    not fit.
    """
    check_lengths(in_length, out_length)
    check_patch(patch, levels)
    check_choice("input_scaling", input_scaling, InputScaling)
    body = build_dense_encoder(encoder, in_length, levels)
    norm: NormKind = "batch" if any(isinstance(m, nn.BatchNorm2d) for m in body.modules()) else "layer"
    head = build_decoder(decoder, out_length, decoder_width, levels, decoder_norm)
    channels = encoder_channels(body)
    densify = Densify(channels, head.in_widths, norm)
    between = build_translation(translation, channels[-len(head.in_widths) :], out_length)
    return SpatSpark(body, between, densify, head, in_length, out_length, patch, output_norm, unit, input_scaling)
