"""Translation networks: turn the encoder's features of the past into features of the future for the decoder.

They stand between encoder and densify, one for each level, and map ``(B, C, h, w)`` to the same shape, so that
a decoder that was pretrained on the encoder's features still fits. Except for the paper's `ConvTanh` they add to
their input, and add nothing at first: a pretrained model starts as what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatspark_fast.common.options import check_choice
from spatspark_fast.models.choices import TranslationKind

__all__ = [
    "AxialAttention",
    "ConvTanh",
    "Recurrent",
    "ResidualConv",
    "Translation",
    "build_translation",
]


class ConvTanh(nn.Sequential):
    """Apply ``layers`` times a 3x3 convolution and tanh, as SpaT-SparK does (arXiv 2412.15917)."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        for _ in range(layers):
            self.append(nn.Conv2d(channels, channels, kernel_size=3, padding=1))
            self.append(nn.Tanh())
        self.apply(_init_weights)


class ResidualConv(nn.Module):
    """Add two 3x3 convolutions with a norm and GELU between, the second one zero at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.apply(_init_weights)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to the same shape."""
        return x + self.conv2(F.gelu(self.norm(self.conv1(x))))


class AxialAttention(nn.Module):
    """Let every position attend along its row and its column, then mix channels; adds nothing at the start.

    Axial attention (arXiv 1912.12180): each position reads ``h + w`` others instead of ``h * w``. A depthwise 3x3
    convolution tells where a position lies (arXiv 2102.10882), so that any image size fits.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = _heads(channels)
        self.place = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.norm1 = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 2 * 3 * channels, kernel_size=1)  # for rows, and for columns
        self.out = nn.Conv2d(2 * channels, channels, kernel_size=1)
        self.norm2 = nn.GroupNorm(1, channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, kernel_size=1),
        )
        self.apply(_init_weights)
        for last in (self.place, self.out, self.mlp[-1]):
            nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to the same shape."""
        x = x + self.place(x)
        rows, columns = self.qkv(self.norm1(x)).chunk(2, dim=1)
        along_rows = self._attend(rows)
        along_columns = self._attend(columns.transpose(2, 3)).transpose(2, 3)
        x = x + self.out(torch.cat((along_rows, along_columns), dim=1))
        return x + self.mlp(self.norm2(x))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attend along the last axis of ``(B, 3C, h, w)``; return ``(B, C, h, w)``."""
        # (B, 3, heads, C/heads, h, w) -> (3, B * h, heads, w, C/heads): four axes, as ONNX and fused kernels need
        parts = qkv.unflatten(1, (3, self.heads, -1)).permute(1, 0, 4, 2, 5, 3).flatten(1, 2)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2]).unflatten(0, (qkv.shape[0], -1))
        return mixed.permute(0, 2, 4, 1, 3).flatten(1, 2)


class Recurrent(nn.Module):
    """Step a convolutional GRU through the lead times, then bring its states back into one map.

    The input ``(B, C, h, w)`` sets the first state of ``hidden`` channels and drives every step, so one cell
    serves all ``steps`` lead times. The states, one for each frame to come, are concatenated and added to the
    input by a 1x1 convolution that is zero at the start. ConvGRU: arXiv 1511.06432.
    """

    def __init__(self, channels: int, steps: int, hidden: int) -> None:
        super().__init__()
        self.steps = steps
        self.start = nn.Conv2d(channels, hidden, kernel_size=1)
        self.drive = nn.Conv2d(channels, 3 * hidden, kernel_size=1)  # the same at every step
        self.gates = nn.Conv2d(hidden, 2 * hidden, kernel_size=3, padding=1, bias=False)
        self.candidate = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, bias=False)
        self.out = nn.Conv2d(steps * hidden, channels, kernel_size=1)
        self.apply(_init_weights)
        for recurrent in (self.gates, self.candidate):
            nn.init.orthogonal_(recurrent.weight.view(recurrent.weight.shape[0], -1))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to the same shape."""
        state = torch.tanh(self.start(x))
        drive_update, drive_reset, drive_candidate = self.drive(x).chunk(3, dim=1)
        states = []
        for _ in range(self.steps):
            update, reset = self.gates(state).chunk(2, dim=1)
            update, reset = torch.sigmoid(update + drive_update), torch.sigmoid(reset + drive_reset)
            candidate = torch.tanh(self.candidate(reset * state) + drive_candidate)
            state = torch.lerp(state, candidate, update)
            states.append(state)
        return x + self.out(torch.cat(states, dim=1))


class Translation(nn.Module):
    """Hold one network for each level that the decoder reads, shallow to deep.

    Levels of the encoder that no decoder reads are left out: with fewer networks than features, the deepest
    features are taken.
    """

    def __init__(self, levels: Sequence[nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features ``(B, C, h, w)``, shallow to deep, to maps of the same shapes."""
        wanted = features[-len(self.levels) :]
        return [level(feature) for level, feature in zip(self.levels, wanted, strict=True)]


def build_translation(kind: TranslationKind, channels: Sequence[int], out_length: int) -> Translation:
    """Build the networks of a kind for levels of so many ``channels``, shallow to deep.

    ``out_length`` is the number of frames to come, which `Recurrent` steps through. Raises UserError for a kind
    that does not exist.
    """

    def conv_tanh(level: int, width: int) -> nn.Module:
        return ConvTanh(width, layers=1 if len(channels) - level <= 2 else 2)

    builders: dict[TranslationKind, Callable[[int, int], nn.Module]] = {
        "conv_tanh": conv_tanh,
        "identity": lambda level, width: nn.Identity(),
        "residual_conv": lambda level, width: ResidualConv(width),
        "attention": lambda level, width: AxialAttention(width),
        "recurrent": lambda level, width: Recurrent(width, out_length, hidden=min(width, max(16, width // 8))),
    }
    check_choice("translation", kind, TranslationKind)
    return Translation([builders[kind](level, width) for level, width in enumerate(channels)])


def _heads(channels: int) -> int:
    """Return the number of heads, of 32 channels where they divide evenly."""
    return next(heads for heads in range(max(channels // 32, 1), 0, -1) if channels % heads == 0)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
