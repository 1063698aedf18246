"""Features, statistics and all gradients of sparsified encoders equal dense-and-mask, in float64; docs/models.md."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from patchsparse import PatchGrid, UnsupportedModuleError, bind, pack, sparsify

from ..matrix import rest_but
from .dense_masked import DenseMasked
from .sparsify_cases import UNEQUAL, as_list, assert_close, assert_parity, encoder, images, loss_of

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
EXACT = [
    name
    for line in (
        "resnet18 resnet50 resnet50d resnext50_32x4d wide_resnet50_2 convnext_tiny convnextv2_tiny regnety_004",
        "efficientnet_b0 mobilenetv3_small_100 densenet121 vgg11_bn ecaresnet50t rexnet_100 resnetv2_50d_gn",
        "ese_vovnet19b_dw poolformer_s12",
    )
    for name in line.split()
]

LARGEST = (
    *("wide_resnet50_2", "resnet50", "resnext50_32x4d", "resnetv2_50", "gcresnet50t", "convnext_tiny"),
    *("nfnet_f0", "hrnet_w18", "cspdarknet53", "inception_next_tiny", "rexnet_100"),
)


def but_the_largest(names: list[str]) -> list[Any]:
    """Mark the largest models as the rest: others of their kind are checked by default."""
    return rest_but([name for name in names if name not in LARGEST], names)


@pytest.mark.parametrize("name", but_the_largest(EXACT))
def test_model_equals_dense_and_mask(name: str) -> None:
    channels = 12 if name in ("resnet18", "convnext_tiny") else 3
    assert_parity(encoder(name, channels), UNEQUAL, 32, channels)


def test_patches_of_16_pixels_on_a_rectangular_grid_with_an_empty_image() -> None:
    active = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(5)) < 0.4
    active[1] = False
    for name in ("resnet18", "regnety_002", "convnextv2_atto", "resnetv2_50d_gn"):
        last = 3 if "convnext" in name else 4
        assert_parity(encoder(name, out_indices=tuple(range(last))), active, 16)


def test_patches_of_64_pixels() -> None:
    assert_parity(encoder("resnet18"), UNEQUAL[:, :1], 64)


def test_eval_mode_uses_running_statistics() -> None:
    model = encoder("efficientnet_b0")
    model(images(UNEQUAL, 32))  # fills the running statistics
    assert_parity(model.eval(), UNEQUAL, 32)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_100"])
def test_drop_path_drops_the_images_that_the_dense_model_drops(name: str) -> None:
    active = UNEQUAL.repeat(2, 1, 1)
    assert_parity(encoder(name, drop_path_rate=0.5), active, 32)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto", "regnety_002", "resnetv2_50d_gn"])
def test_everything_active_equals_the_plain_dense_model(name: str) -> None:
    model = encoder(name)
    plain = copy.deepcopy(model)
    sparsify(model)
    grid = PatchGrid.from_active(torch.ones(2, 2, 3, dtype=torch.bool))
    x = images(grid.active, 32)
    with bind(model, grid):
        features = model(pack(x, grid))
    for ours, theirs in zip(features, plain(x), strict=True):
        assert_close(ours, pack(theirs, grid), 0.0, name)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto", "regnety_002", "nf_resnet26", "rexnet_100"])
def test_without_a_grid_the_model_is_the_plain_one_bit_for_bit(name: str) -> None:
    model = encoder(name).float()
    plain = copy.deepcopy(model)
    x = images(UNEQUAL, 32, dtype=torch.float32)
    for ours, theirs in zip(sparsify(model)(x), plain(x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.rest  # of whole models: tests/models/test_spark_parity.py
@pytest.mark.parametrize("name", ["resnet10t", "resnet18"])
def test_twenty_steps_of_sgd_stay_together(name: str) -> None:
    model = encoder(name, 12)
    reference = DenseMasked(model)
    sparsify(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    first = last = 0.0
    for step in range(20):
        # 6 active positions at the deepest stage; with 4, BatchNorm there multiplies rounding by 1e5 in 20 steps
        grid = PatchGrid.random(2, (2, 3), 0.5, generator=torch.Generator().manual_seed(step))
        x = images(grid.active, 32, 12)
        with bind(model, grid):
            loss = sum((f**2).mean() for f in model(pack(x, grid)))
        expected = sum((pack(f, grid) ** 2).mean() for f in reference(x, grid.active))
        assert isinstance(loss, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        assert_close(loss, expected, 0.0, f"loss at step {step}")
        for optimiser, value in ((ours, loss), (theirs, expected)):
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        first, last = first or float(loss.detach()), float(loss.detach())
    assert last < 0.9 * first
    for (key, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(p, q, 0.0, key)


def test_whole_classifier_pools_over_active_pixels() -> None:
    model = encoder("resnet18", features_only=False, num_classes=5)
    reference = DenseMasked(model)
    reference.model.get_submodule("global_pool.pool").forward = _masked_mean(reference)  # type: ignore[method-assign]
    sparsify(model)
    grid = PatchGrid.from_active(UNEQUAL)
    x = images(UNEQUAL, 32)
    with bind(model, grid):
        logits = model(pack(x, grid))
    assert logits.shape == (2, 5)
    assert_close(logits, reference(x, UNEQUAL), 0.0, "logits")


def _masked_mean(reference: DenseMasked):
    def forward(x: torch.Tensor) -> torch.Tensor:
        where = reference.map_of(x)
        return (x * where).sum((2, 3)) / where.sum((2, 3))

    return forward


def test_autocast_to_bfloat16_stays_near_float32() -> None:
    for name in ("resnet18", "regnety_002", "convnextv2_atto"):
        model = sparsify(encoder(name).float())
        grid = PatchGrid.from_active(UNEQUAL)
        x = pack(images(UNEQUAL, 32, dtype=torch.float32), grid)
        with bind(model, grid):
            wide = as_list(model(x))
            with torch.autocast("cpu", torch.bfloat16):
                narrow = as_list(model(x))
        loss_of([f.float() for f in narrow]).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        cosine = torch.nn.functional.cosine_similarity(narrow[-1].float().flatten(), wide[-1].flatten(), dim=0)
        assert cosine > 0.98, name


def rows() -> list[tuple[str, str]]:
    """Return (model, result) for each row of docs/models.md."""
    found = re.findall(r"^\| `(\w+)` \| (exact|verified|refused)", TABLE.read_text(), flags=re.M)
    assert len(found) > 30
    return found


def test_the_table_names_the_models_that_are_compared_with_the_reference() -> None:
    assert [name for name, result in rows() if result == "exact"] == EXACT


@pytest.mark.parametrize("name", but_the_largest([name for name, result in rows() if result == "verified"]))
def test_model_in_the_table_passes_verification(name: str) -> None:
    sparsify(timm.create_model(name, features_only=True, pretrained=False), verify=True)


@pytest.mark.parametrize("name", but_the_largest([name for name, result in rows() if result == "refused"]))
def test_model_in_the_table_is_refused_with_and_without_verification(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, pretrained=False)
    with pytest.raises(UnsupportedModuleError, match="'"):
        sparsify(model)
    with pytest.raises(UnsupportedModuleError, match="'"):
        sparsify(timm.create_model(name, features_only=True, pretrained=False), verify=True)
