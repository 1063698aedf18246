"""patchsparse.testing.DenseAndMask equals the independent reference, and says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchsparse import PatchGrid, UnsupportedModuleError, pack, sparsify
from patchsparse.testing import DenseAndMask, check_parity

from .dense_masked import DenseMasked
from .sparsify_cases import UNEQUAL, as_list, assert_close, assert_same_gradients, encoder, images, loss_of

EQUAL = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[1, 1, 0], [1, 0, 1]]], dtype=torch.bool)


@pytest.mark.parametrize("sparsified", [False, True])
@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("resnet10t", UNEQUAL),  # convolutions, poolings and batch norms alone take any grid
        ("convnextv2_atto", EQUAL),
        ("regnety_002", EQUAL),
        ("ecaresnet26t", EQUAL),
        ("mobilenetv3_small_050", EQUAL),
    ],
)
def test_features_statistics_and_gradients_are_those_of_the_reference(
    name: str, active: Tensor, sparsified: bool
) -> None:
    model = encoder(name)
    reference = DenseMasked(model)
    grid = PatchGrid.from_active(active)
    ours = DenseAndMask(sparsify(model) if sparsified else model, grid)
    assert ours.model.state_dict().keys() == model.state_dict().keys()
    x = images(active, 32)
    expected = [pack(f, grid) for f in as_list(reference(x, active))]
    found = [pack(f, grid) for f in as_list(ours(x))]
    for level, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(own, other, 0.0, f"feature {level}")
    loss_of(expected).backward()
    loss_of(found).backward()
    assert_same_gradients(ours.model, reference.model)
    assert all(p.grad is None for p in model.parameters()), "the model was not copied"
    for (key, own), other in zip(ours.model.named_buffers(), reference.model.buffers(), strict=True):
        assert_close(own, other, 0.0, key)


def test_another_grid_may_be_set_and_the_image_must_fit_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double().eval()
    ours = DenseAndMask(model, PatchGrid.from_active(EQUAL))
    x = images(UNEQUAL, 8)
    ours.grid = PatchGrid.from_active(UNEQUAL)
    assert_close(pack(ours(x), ours.grid), pack(DenseMasked(model)(x, UNEQUAL), ours.grid), 0.0, "features")
    with pytest.raises(ValueError, match="B=2"):
        ours(x[:1])
    with pytest.raises(ValueError, match="does not divide"):
        ours(x[:, :, 1:])


def test_one_active_pixel_in_each_image_is_pooled_too() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1))
    one = torch.tensor([[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]]], dtype=torch.bool)
    x = images(one, 1, dtype=torch.float32)
    expected = model[1](x[one[:, None].expand_as(x)].view(2, 3, 1, 1))
    torch.testing.assert_close(DenseAndMask(model, PatchGrid.from_active(one))(x), expected)


def test_what_has_no_meaning_on_masked_images_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"'1'.*output_size=2"):
        DenseAndMask(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2)), PatchGrid.from_active(EQUAL))
    unequal = DenseAndMask(nn.GroupNorm(1, 3).double(), PatchGrid.from_active(UNEQUAL))
    with pytest.raises(ValueError, match="same number"):
        unequal(images(UNEQUAL, 8))


class ChannelsLast(nn.Module):
    """Apply a linear layer in channels-last shape, as ConvNeXt does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [4, 6])
def test_channels_that_could_be_columns_of_the_grid_are_no_pixels(channels: int) -> None:
    """Six channels in channels-last shape divide by the three columns of the parity check's grid."""
    check_parity(nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), ChannelsLast(channels)))
