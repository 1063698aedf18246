"""Multiply-adds: against the figures of the published model, and against pairs counted one by one."""

from __future__ import annotations

import pytest
import torch

from spatspark_fast.models import build_spark
from spatspark_fast.models.macs import count_macs


def test_published_model() -> None:
    """ResNet-18, 12x288x288: encoder 3.6 G, densify 0.9 G, decoder 16.7 G; the sparse encoder saves 1.1x."""
    model = build_spark()
    macs = count_macs(model, (288, 288), visible=32 / 81)
    assert macs.encoder.dense / 1e9 == pytest.approx(3.6, abs=0.05)
    assert macs.densify / 1e9 == pytest.approx(0.9, abs=0.05)
    assert macs.decoder / 1e9 == pytest.approx(16.7, abs=0.1)
    assert macs.dense_step / 1e9 == pytest.approx(21.2, abs=0.1)
    assert macs.saving == pytest.approx(1.1, abs=0.05)
    assert macs.encoder.visible == pytest.approx(macs.encoder.dense * 32 / 81)
    assert macs.encoder.pairs < macs.encoder.visible
    assert next(model.parameters()).device.type == "cpu"


def test_densify_and_decoder_by_hand() -> None:
    macs = count_macs(build_spark(), (288, 288), visible=1.0)
    levels = [(512, 768, 1, 9), (256, 384, 9, 18), (128, 192, 9, 36), (64, 96, 9, 72)]
    assert macs.densify == sum(channels * width * taps * side**2 for channels, width, taps, side in levels)
    # Each block, at its low resolution: 4x4 transposed, then 3x3 twice at double resolution, the second halving.
    blocks = sum((768 >> i) ** 2 * (9 << i) ** 2 * (16 + 36 + 18) for i in range(5))
    assert macs.decoder == blocks + 24 * 12 * 288**2


def test_light_decoder_leaves_the_encoder_as_the_cost() -> None:
    macs = count_macs(build_spark(decoder="light", decoder_width=256), (288, 288), visible=0.4)
    assert macs.densify == 512 * 256 * 81
    block = 256 * 49 + 2 * 4 * 256**2
    assert macs.decoder == 81 * (block + 256 * 32 * 32 * 12)
    assert macs.saving > 1.5


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
def test_dense_counts_do_not_depend_on_the_mask(encoder: str) -> None:
    model = build_spark(encoder, decoder="light", decoder_width=32)
    full, half = (count_macs(model, (64, 96), visible) for visible in (1.0, 0.5))
    assert full.encoder.dense == half.encoder.dense == full.encoder.visible
    assert full.decoder == half.decoder


def test_expected_pairs_match_pairs_counted_on_masks() -> None:
    """Count pairs as the response of all-ones convolutions to the mask, averaged over all masks of that size."""
    model = build_spark("resnet18", in_chans=1, decoder="light", decoder_width=32)
    expected = count_macs(model, (64, 64), visible=0.5).encoder.pairs
    masks = [torch.tensor([int(bit) for bit in f"{code:04b}"]).bool().view(1, 2, 2) for code in range(16)]
    masks = [active for active in masks if active.sum() == 2]
    total = sum(count_by_convolution(model.encoder, active) for active in masks)
    assert expected == pytest.approx(total / len(masks), rel=1e-12)


def count_by_convolution(encoder: torch.nn.Module, active: torch.Tensor) -> float:
    total = 0.0

    def hook(layer: torch.nn.Conv2d, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        source, result = (
            active.double().repeat_interleave(x.shape[2] // 2, 1).repeat_interleave(x.shape[3] // 2, 2)
            for x in (arguments[0], output)
        )
        ones = torch.ones(1, 1, *layer.kernel_size, dtype=torch.float64)
        reach = torch.nn.functional.conv2d(source[:, None], ones, None, layer.stride, layer.padding)
        total += (reach[:, 0] * result).sum().item() * layer.in_channels * layer.out_channels

    layers = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        encoder(torch.zeros(1, 1, 64, 64))
    for handle in handles:
        handle.remove()
    return total


def test_share_out_of_range() -> None:
    with pytest.raises(ValueError, match="visible"):
        count_macs(build_spark(decoder="light", decoder_width=32), (64, 64), visible=0.0)
