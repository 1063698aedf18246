"""Encoders by timm name: shapes, refusals, and weights that go back into plain timm models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from patchsparse import PatchGrid, bind, pack
from patchsparse.onednn import ClearConv2d
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.backbones import (
    build_dense_encoder,
    build_encoder,
    encoder_channels,
    encoder_state_dict,
    load_encoder,
    save_encoder,
)

IN_CHANS = 12


@pytest.mark.parametrize("name", ["resnet18", "regnety_004", "densenet121", "vgg11_bn", "efficientnet_b0"])
def test_feature_maps_at_the_four_strides(name: str) -> None:
    encoder = build_encoder(name, in_chans=5).eval()
    grid = PatchGrid.random(2, (2, 3), keep=3)
    frames = torch.randn(2, 5, 64, 96)
    with torch.no_grad(), bind(encoder, grid):
        features = encoder(pack(frames, grid))
    assert [tuple(f.shape[2:]) for f in features] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert tuple(f.shape[1] for f in features) == encoder_channels(encoder)


def test_fewer_levels_cut_the_encoder_off() -> None:
    full, short = build_encoder("resnet18", 3), build_encoder("resnet18", 3, levels=2)
    assert encoder_channels(short) == encoder_channels(full)[:2] == (64, 128)
    assert not any(key.startswith("layer3") for key in short.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_weights_load_into_plain_timm_models(name: str, tmp_path: Path) -> None:
    encoder = build_encoder(name, IN_CHANS).eval()
    frames = torch.randn(1, IN_CHANS, 64, 96)
    save_encoder(encoder, tmp_path / "features.safetensors", layout="features")
    save_encoder(encoder, tmp_path / "classifier.safetensors")

    features = timm.create_model(name, in_chans=IN_CHANS, features_only=True).eval()
    features.load_state_dict(load_file(tmp_path / "features.safetensors"))
    classifier: Any = timm.create_model(name, in_chans=IN_CHANS).eval()
    result = classifier.load_state_dict(load_file(tmp_path / "classifier.safetensors"), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys
    assert all(key.split(".")[0] in ("fc", "head") for key in result.missing_keys)

    with torch.no_grad():
        deepest = encoder(frames)[-1]
        torch.testing.assert_close(features(frames)[-1], deepest)
        torch.testing.assert_close(classifier.forward_intermediates(frames)[1][-1], deepest)


def test_file_says_what_it_holds(tmp_path: Path) -> None:
    save_encoder(build_encoder("resnet18", 3), tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["architecture"] == "resnet18"


@pytest.mark.parametrize("layout", ["classifier", "features"])
@pytest.mark.parametrize("name", ["densenet121", "convnext_atto"])
def test_load_restores_either_layout(name: str, layout: str, tmp_path: Path) -> None:
    source, target = build_encoder(name, 3), build_encoder(name, 3)
    save_encoder(source, tmp_path / "weights.safetensors", layout=layout)  # type: ignore[arg-type]
    load_encoder(target, tmp_path / "weights.safetensors")
    restored = target.state_dict()
    assert all(torch.equal(value, restored[key]) for key, value in source.state_dict().items())


def test_keys_without_flattening_are_timm_keys() -> None:
    plain = timm.create_model("convnext_tiny", in_chans=3).state_dict()
    state = encoder_state_dict(build_encoder("convnext_tiny", 3))
    assert {key: value.shape for key, value in state.items()}.items() <= {
        key: value.shape for key, value in plain.items()
    }.items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "unknown encoder 'resnet81': did you mean resnet18"),
        ("zzzz", r"timm\.list_models\(\)"),
        ("vit_tiny_patch16_224", "no feature map at stride 4 .it has 16."),
        ("swin_tiny_patch4_window7_224", "'swin_tiny_patch4_window7_224' cannot run on visible patches"),
        ("test_mambaout", "'test_mambaout' cannot run on visible patches: its feature maps have their channels last"),
    ],
)
def test_encoders_that_cannot_serve(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(name, 3)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    encoder, path = build_encoder("resnet18", 3), tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match=r"cannot read encoder weights from .*weights"):
        load_encoder(encoder, path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="cannot read encoder weights"):
        load_encoder(encoder, path)
    save_encoder(build_encoder("resnet18", 12), path)
    with pytest.raises(UserError, match=r"conv1\.weight is \(64, 12, 7, 7\), the encoder needs \(64, 3, 7, 7\)"):
        load_encoder(encoder, path)
    save_encoder(build_encoder("convnext_atto", 3), path)
    with pytest.raises(UserError, match="lacks 120 of 120 weights of encoder 'resnet18'"):
        load_encoder(encoder, path)


def test_no_frames() -> None:
    with pytest.raises(UserError, match="at least 1, got 0"):
        build_encoder("resnet18", 0)


def test_encoders_for_whole_images_keep_clear_of_onednn() -> None:
    """The stem of RepVGG has a strided 1x1 branch on the frames, whose weight gradient oneDNN gets wrong."""
    plain = timm.create_model("repvgg_a0", in_chans=IN_CHANS, features_only=True)
    encoder = build_dense_encoder("repvgg_a0", IN_CHANS)
    clear = [name for name, module in encoder.named_modules() if type(module) is ClearConv2d]
    assert clear == ["stem.conv_1x1.conv"]
    assert list(encoder.state_dict()) == list(plain.state_dict())
