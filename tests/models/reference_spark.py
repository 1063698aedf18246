"""An independent SparK for the tests: dense tensors, multiplied by the mask after every layer.

Written from the paper with plain PyTorch and timm. It shares no code with the package under test, only the
names of parameters, so that one state dict serves both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mask:
    """Carry the visible patches ``(B, Gh, Gw)`` bool to the layers of one model; None means no mask."""

    def __init__(self) -> None:
        self.active: Tensor | None = None

    def at(self, height: int, width: int) -> Tensor:
        assert self.active is not None
        up, across = height // self.active.shape[1], width // self.active.shape[2]
        return self.active.repeat_interleave(up, 1).repeat_interleave(across, 2)


class MaskedBatchNorm(nn.BatchNorm2d):
    """Batch norm over visible positions: collected, normalised as rows, and written into zeros."""

    mask: Mask

    def forward(self, input: Tensor) -> Tensor:
        if self.mask.active is None:
            return super().forward(input)
        where = self.mask.at(*input.shape[2:])
        last = input.permute(0, 2, 3, 1)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        rows = F.batch_norm(
            last[where],
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1,
            self.eps,
        )
        return torch.zeros_like(last).index_put((where,), rows).permute(0, 3, 1, 2)


def masked_batch_norm(norm: nn.BatchNorm2d, mask: Mask) -> MaskedBatchNorm:
    own = MaskedBatchNorm(norm.num_features, eps=norm.eps)
    own.mask = mask
    return own


def mask_layers(module: nn.Module, mask: Mask) -> None:
    """Zero the output of every layer at masked positions; swap batch norms."""

    def hook(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        if mask.active is None or output.ndim != 4:
            return output
        if isinstance(layer, nn.Linear) or type(layer) is nn.LayerNorm or type(layer).__name__ == "LayerNorm":
            return output * mask.at(*output.shape[1:3]).unsqueeze(3)
        return output * mask.at(*output.shape[2:]).unsqueeze(1)

    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, masked_batch_norm(child, mask))
        elif isinstance(child, nn.Conv2d | nn.MaxPool2d | nn.Linear | nn.LayerNorm):
            child.register_forward_hook(hook)
        else:
            mask_layers(child, mask)


class ReferenceLevel(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, layer_norm: bool, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.norm = (
            nn.LayerNorm(channels, eps=1e-6) if layer_norm else masked_batch_norm(nn.BatchNorm2d(channels), mask)
        )
        self.mask_token = nn.Parameter(torch.zeros(channels))
        same = kernel == 1 and channels == width
        self.proj = nn.Identity() if same else nn.Conv2d(channels, width, kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = self.norm(x)
        if self.mask.active is not None:
            where = self.mask.at(*x.shape[2:]).unsqueeze(1).expand_as(x)
            x = torch.where(where, x, self.mask_token[None, :, None, None].expand_as(x))
        return self.proj(x)


class ReferenceBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 4, 2, 1)
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act = nn.LeakyReLU(0.01)
        self.conv2 = nn.Conv2d(channels, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(self.up(x))))
        return self.norm2(self.conv2(x))


class ReferenceUNet(nn.Module):
    def __init__(self, out: int, width: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.count = len(strides)
        stride, channels, blocks = strides[-1], width, []
        while stride > 1:
            blocks.append(ReferenceBlock(channels, channels // 2))
            stride, channels = stride // 2, channels // 2
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, out, 1)

    def forward(self, coarse_to_fine: list[Tensor]) -> Tensor:
        x: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if index < self.count:
                extra = coarse_to_fine[index]
                x = extra if x is None else x + extra
            x = block(x)
        assert x is not None
        return self.head(x)


class ReferenceNeXt(nn.Module):
    """The ConvNeXt V2 block, with global response normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, 4 * width)
        self.mlp.grn = nn.Module()
        self.mlp.grn.weight = nn.Parameter(torch.zeros(4 * width))
        self.mlp.grn.bias = nn.Parameter(torch.zeros(4 * width))
        self.mlp.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = F.gelu(self.mlp.get_submodule("fc1")(y))
        energy = y.square().sum((1, 2), keepdim=True).sqrt()
        relative = energy / (energy.mean(-1, keepdim=True) + 1e-6)
        grn = self.mlp.get_submodule("grn")
        y = y + grn.get_parameter("weight") * (y * relative) + grn.get_parameter("bias")
        return x + self.mlp.get_submodule("fc2")(y).permute(0, 3, 1, 2)


class ReferenceLight(nn.Module):
    def __init__(self, out: int, width: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.out, self.stride = out, strides[-1]
        self.block = ReferenceNeXt(width)
        self.head = nn.Conv2d(width, out * self.stride**2, 1)

    def forward(self, coarse_to_fine: list[Tensor]) -> Tensor:
        tokens = self.head(self.block(coarse_to_fine[0]))
        b, _, h, w = tokens.shape
        s = self.stride
        return torch.einsum("ncpqhw->nchpwq", tokens.view(b, self.out, s, s, h, w)).reshape(b, self.out, h * s, w * s)


class ReferenceOutput(NamedTuple):
    loss: Tensor
    prediction: Tensor
    features: list[Tensor]


class ReferenceSparK(nn.Module):
    """SparK by dense-and-mask. ``forward(frames, active)``; features come back dense, shallow to deep."""

    def __init__(
        self,
        encoder: str,
        in_chans: int,
        decoder: str = "unet",
        width: int = 64,
        loss_on: str = "masked",
        strides: tuple[int, ...] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        self.mask = Mask()
        self.loss_on = loss_on
        residual = encoder.startswith("resnet")
        indices = tuple(range(1 if residual else 0, len(strides) + (1 if residual else 0)))
        self.encoder: Any = timm.create_model(encoder, in_chans=in_chans, features_only=True, out_indices=indices)
        channels = self.encoder.feature_info.channels()
        mask_layers(self.encoder, self.mask)
        names = range(len(strides)) if decoder == "unet" else [len(strides) - 1]
        self.densify = nn.Module()
        self.densify.levels = nn.ModuleList()
        for index in names:
            from_deepest = len(strides) - 1 - index
            kernel = 1 if from_deepest == 0 else 3
            level = ReferenceLevel(channels[index], width // 2**from_deepest, kernel, not residual, self.mask)
            self.densify.levels.append(level)
        kind = ReferenceUNet if decoder == "unet" else ReferenceLight
        self.decoder = kind(in_chans, width, strides)

    def forward(self, frames: Tensor, active: Tensor | None) -> ReferenceOutput:
        self.mask.active = active
        visible = frames if active is None else frames * self.mask.at(*frames.shape[2:]).unsqueeze(1)
        features = self.encoder(visible)
        levels = list(self.densify.levels)  # type: ignore[arg-type]
        dense = [level(feature) for level, feature in zip(levels, features[-len(levels) :], strict=True)]
        prediction = self.decoder(dense[::-1])
        shown = torch.ones(1, 1, 1, dtype=torch.bool) if active is None else active
        return ReferenceOutput(self.loss(prediction, frames, shown), prediction, features)

    def loss(self, prediction: Tensor, frames: Tensor, active: Tensor) -> Tensor:
        rows, columns = active.shape[1:]
        b, c, h, w = frames.shape

        def cut(x: Tensor) -> Tensor:
            x = x.reshape(b, c, rows, h // rows, columns, w // columns)
            return torch.einsum("bchpwq->bhwpqc", x).reshape(b, rows * columns, -1)

        target, guess = cut(frames), cut(prediction)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        per_patch = ((guess - target) ** 2).mean(-1)
        if self.loss_on == "all":
            return per_patch.sum() / b
        masked = (~active).view(b, -1).to(per_patch.dtype)
        # SparK adds 1e-8 to the divisor; without it the comparison can be exact to 1e-9.
        return (per_patch * masked).sum() / masked.sum()
