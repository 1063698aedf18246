"""Multiply-adds: against the figures of the published model, and against pairs counted one by one."""

from __future__ import annotations

import pytest
import torch

from patchsparse import PatchGrid
from spatspark_fast.models.macs import count_macs
from spatspark_fast.models.spark import build_spark


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
    masked = count_macs(build_spark(decoder="light", decoder_width=256), (288, 288), visible=0.4, decoded=(49,))
    assert masked.active("decoder") == pytest.approx(81 * block + 49 * 256 * 32 * 32 * 12)


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
        source, result = (PatchGrid.from_active(active).pixels(x.shape[2:]).double() for x in (arguments[0], output))
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


def test_blocks_add_up_and_sparse_decoding_leaves_the_fine_ones() -> None:
    """ResNet-18 at 60 % masked, a region of 4 x 5 patches: 10.8 G instead of 21.2 G, counted by hand."""
    macs = count_macs(build_spark(), (288, 288), visible=32 / 81, decoded=(4, 5))
    blocks = {block.name: block for block in macs.blocks}
    assert list(blocks)[:5] == ["encoder.conv1", *(f"encoder.layer{i}" for i in (1, 2, 3, 4))]
    assert sum(block.dense for block in macs.blocks) == macs.dense_step
    for part, dense in (("encoder", macs.encoder.dense), ("densify", macs.densify), ("decoder", macs.decoder)):
        assert sum(block.dense for name, block in blocks.items() if name.startswith(part)) == dense
    # Pixels of each block's input, and between its 3x3 convolutions: the region, and what is read around it.
    inputs = (9 * 9, 14 * 16, 22 * 26, 38 * 46, 68 * 84)
    between = (16 * 18, 24 * 28, 40 * 48, 70 * 86, 130 * 162)
    active = {"densify.levels.3": blocks["densify.levels.3"].dense}
    for i, (given, middle) in enumerate(zip(inputs, between, strict=True)):
        width = 768 >> i
        active[f"decoder.blocks.{i}"] = width**2 * (given * (16 + 4 * 9) + middle * 9 / 2)
    for level, (channels, width, pixels) in enumerate(((64, 96, 40 * 48), (128, 192, 24 * 28), (256, 384, 16 * 18))):
        active[f"densify.levels.{level}"] = channels * width * 9 * pixels
    active["decoder.head"] = 24 * 12 * 128 * 160
    for name, block in blocks.items():
        assert block.active == pytest.approx(block.dense * 32 / 81 if name not in active else active[name]), name
    assert macs.sparse_step / 1e9 == pytest.approx(10.8, abs=0.05)


def test_levels_without_a_projection_do_not_shift_the_others() -> None:
    """ConvNeXt-T's deepest map has the decoder's width already, so that level 3 multiplies nothing."""
    blocks = {b.name: b for b in count_macs(build_spark("convnext_tiny"), (288, 288), 0.4, decoded=(4, 5)).blocks}
    assert "densify.levels.3" not in blocks
    assert blocks["densify.levels.2"].active == pytest.approx(16 * 18 / 18**2 * blocks["densify.levels.2"].dense)
    assert blocks["encoder.stages_2"].dense > 0


def test_stages_that_are_called_one_by_one_are_named() -> None:
    names = [b.name for b in count_macs(build_spark("efficientnet_b0"), (64, 64), 0.4).blocks]
    assert "encoder.blocks.6" in names
    assert "encoder.others" not in names


def test_share_out_of_range() -> None:
    with pytest.raises(ValueError, match="visible"):
        count_macs(build_spark(decoder="light", decoder_width=32), (64, 64), visible=0.0)
