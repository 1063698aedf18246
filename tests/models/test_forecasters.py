"""Forecasters on the dense path: shapes, pretrained weights, freezing, persistence, checkpoints that cannot be read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from patchsparse import PatchGrid, bind, pack, unpack
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.backbones import build_dense_encoder, build_encoder
from spatspark_fast.models.choices import DecoderKind, Freeze, TranslationKind
from spatspark_fast.models.forecaster import Forecaster, Persistence, pad_to_multiple
from spatspark_fast.models.registry import build_forecaster, describe_forecaster, load_forecaster
from spatspark_fast.models.smaat import CBAM, SmaAtUNet
from spatspark_fast.models.spark import build_spark
from spatspark_fast.models.spatspark import SpatSpark, build_spatspark

from ..matrix import pairwise
from .parity import make_frames, relative_error, scramble

KINDS = get_args(TranslationKind)
_build: Any = build_spatspark  # for values that its types forbid


def frames_of(length: int, height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, length, height, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("translation", "decoder", "lengths"), pairwise(KINDS, ["unet", "light"], [(3, 7), (5, 2)]))
def test_input_and_output_lengths_may_differ_and_all_weights_learn(
    translation: TranslationKind, decoder: DecoderKind, lengths: tuple[int, int]
) -> None:
    in_length, out_length = lengths
    torch.manual_seed(0)
    model = build_spatspark(
        "resnet18", in_length, out_length, decoder=decoder, decoder_width=32, translation=translation
    )
    scramble(model)
    for module in model.translation.modules():  # what is zero at the start would keep the rest from learning
        if isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.1)
    forecast = model(frames_of(in_length))
    assert forecast.shape == (2, out_length, 64, 96)
    forecast.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert name.endswith("mask_token"), name


@pytest.mark.parametrize("out_length", [3, 5])
@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("decoder", ["unet", "light"])
def test_pretrained_weights_forecast_what_the_pretrained_model_reconstructs(
    encoder: str, decoder: DecoderKind, out_length: int
) -> None:
    """With everything visible and no translation, the dense model is the pretrained one, de-normalised."""
    torch.manual_seed(0)
    pretrained = build_spark(encoder, in_chans=3, decoder=decoder, decoder_width=32).double().eval()
    scramble(pretrained)
    model = build_spatspark(
        encoder, 3, out_length, decoder=decoder, decoder_width=32, translation="identity", output_norm="input_patch"
    )
    kept = model.double().eval().load_pretrained(pretrained.state_dict())
    frames = make_frames(2, 64, 96)
    if out_length != 3:
        assert kept == ["decoder.head.weight", "decoder.head.bias"]
        return
    assert kept == []
    grid = PatchGrid.from_active(torch.ones(2, 2, 3, dtype=torch.bool))
    with torch.no_grad():
        expected = pretrained.reconstruct(frames, grid, keep_visible=False)
        assert relative_error(model(frames), expected) < 1e-9


@pytest.mark.parametrize("translation", ["residual_conv", "attention", "recurrent"])
def test_networks_that_add_begin_as_nothing(translation: TranslationKind) -> None:
    torch.manual_seed(0)
    model = build_spatspark("resnet18", 3, 4, decoder_width=32, translation=translation)
    features = [torch.randn(2, width, 5, 6) for width in (64, 128, 256, 512)]
    for feature, translated in zip(features, model.translation(features), strict=True):
        torch.testing.assert_close(translated, feature)


def test_the_paper_s_network_has_one_convolution_at_the_two_deepest_levels_and_two_at_the_others() -> None:
    torch.manual_seed(0)
    model = build_spatspark("resnet50", 12, 12, decoder_width=32, translation="conv_tanh")
    convolutions = [[m for m in level.modules() if isinstance(m, nn.Conv2d)] for level in model.translation.levels]
    assert [len(level) for level in convolutions] == [2, 2, 1, 1]
    assert [level[0].weight.shape[0] for level in convolutions] == [256, 512, 1024, 2048]
    assert all(0.015 < conv.weight.std().item() < 0.025 for level in convolutions for conv in level)
    x = torch.randn(1, 256, 4, 5)
    first, second = convolutions[0]
    expected = torch.tanh(second(torch.tanh(first(x))))
    torch.testing.assert_close(model.translation.levels[0](x), expected)


def test_axial_attention_looks_along_rows_and_columns_only() -> None:
    torch.manual_seed(0)
    model = build_spatspark("resnet18", 3, 3, decoder_width=32, translation="attention")
    level: Any = model.translation.levels[0]
    qkv = torch.randn(1, 3 * 64, 4, 5, dtype=torch.float64)
    query, key, value = qkv.unflatten(1, (3, level.heads, -1)).unbind(1)
    weights = torch.einsum("bnchw,bnchv->bnhwv", query, key).mul((64 / level.heads) ** -0.5).softmax(-1)
    expected = torch.einsum("bnhwv,bnchv->bnchw", weights, value).flatten(1, 2)
    torch.testing.assert_close(level._attend(qkv), expected)


def test_the_dense_encoder_gives_the_features_of_the_sparse_one_with_everything_active() -> None:
    torch.manual_seed(0)
    sparse = build_encoder("resnet18", 3).double().eval()
    scramble(sparse)
    dense = build_dense_encoder("resnet18", 3).double().eval()
    dense.load_state_dict(sparse.state_dict())
    frames = make_frames(2, 64, 96)
    grid = PatchGrid.from_active(torch.ones(2, 2, 3, dtype=torch.bool))
    with torch.no_grad():
        with bind(sparse, grid):
            packed = sparse(pack(frames, grid))
        for ours, theirs in zip(dense(frames), packed, strict=True):
            assert relative_error(ours, unpack(theirs, grid)) < 1e-9


@pytest.mark.parametrize("parts", get_args(Freeze))
def test_frozen_parts_stay_bit_by_bit_and_their_norms_stay_in_evaluation(parts: Freeze) -> None:
    torch.manual_seed(0)
    model = build_spatspark("resnet18", 3, 3, decoder_width=32, translation="residual_conv")
    model.freeze(parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):  # the second step reaches what a zero held back in the first
        model(frames_of(3)).square().mean().backward()
        optimizer.step()
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {"none": set(), "encoder": {"encoder"}, "decoder": {"densify", "decoder"}}
    frozen["both"] = frozen["encoder"] | frozen["decoder"]
    assert moved == {"encoder", "translation", "densify", "decoder"} - frozen[parts]
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (name.split(".")[0] not in frozen[parts]), name


def test_freezing_leaves_a_new_head_to_train_and_refuses_to_leave_nothing() -> None:
    model = build_spatspark("resnet18", 3, 3, decoder_width=32, translation="identity")
    with pytest.raises(UserError, match="nothing to train"):
        model.freeze("both")
    model = build_spatspark("resnet18", 3, 5, decoder_width=32, translation="identity")
    model.freeze("both", except_head=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["decoder.head.weight", "decoder.head.bias"]


def test_weights_of_another_model_are_refused_by_name() -> None:
    weights = build_spark("resnet18", in_chans=3, decoder_width=64).state_dict()
    model = build_spatspark("resnet18", 3, 3, decoder_width=32)
    with pytest.raises(UserError, match=r"densify\.levels\.0\.proj\.weight is \(8, 64, 3, 3\), not \(4, 64, 3, 3\)"):
        model.load_pretrained(weights)
    with pytest.raises(UserError, match=r"encoder\.conv1\.weight is missing"):
        model.load_pretrained({})


def test_smooth_units_have_the_patch_s_values_at_its_centre_and_no_edges() -> None:
    """A decoder that draws the same everywhere shows the units: steps at patch edges, or a slope between centres."""
    torch.manual_seed(0)
    frames = torch.zeros(1, 3, 96, 96)
    frames[..., 32:64, :] = torch.rand(1, 3, 32, 96)
    forecasts = {}
    for norm in ("input_patch", "input_smooth"):
        model = build_spatspark("resnet18", 3, 2, decoder_width=32, output_norm=norm).eval()
        head: Any = model.decoder.head
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, 2.0)
        with torch.no_grad():
            forecasts[norm] = model(frames)[0, 0, :, 48]
    patch, smooth = forecasts["input_patch"], forecasts["input_smooth"]
    inside = frames[..., 32:64, 32:64]
    torch.testing.assert_close(patch[48], inside.mean() + 2 * inside.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(smooth[47:49], patch[47:49], rtol=0.05, atol=0)
    assert patch.diff().abs().max() > 0.9 * patch.max()
    assert smooth.diff().abs().max() < 0.05 * patch.max()


def test_the_output_counts_in_units() -> None:
    torch.manual_seed(0)
    model = build_spatspark("resnet18", 3, 3, decoder_width=32).eval()
    frames = frames_of(3)
    whole = model(frames)
    model.unit = 0.25
    torch.testing.assert_close(model(frames), whole * 0.25)


def test_smaat_unet_has_four_million_weights_and_attends_channels_then_places() -> None:
    torch.manual_seed(0)
    model = SmaAtUNet(12, 12)
    assert sum(p.numel() for p in model.parameters()) == 4_034_252  # the paper: "about 4 M"
    assert SmaAtUNet(4, 6, base_width=8)(frames_of(4, 48, 64)).shape == (2, 6, 48, 64)
    attention = CBAM(32).eval()
    x = torch.randn(2, 32, 6, 7)
    mlp = attention.channel
    channel = torch.sigmoid(mlp(x.mean((2, 3), keepdim=True)) + mlp(x.amax((2, 3), keepdim=True))) * x
    glance = torch.stack((channel.mean(1), channel.amax(1)), 1)
    expected = channel * torch.sigmoid(attention.norm(attention.place(glance)))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("kind", ["spatspark", "smaat", "persistence"])
def test_predict_takes_any_size_and_gives_no_negative_rain(kind: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"spatspark": {"decoder_width": 32}, "smaat": {"base_width": 8}, "persistence": {}}[kind]
    model = build_forecaster(kind, 3, 4, options).eval()
    frames = frames_of(3, 70, 45)
    forecast = model.predict(frames)
    assert forecast.shape == (2, 4, 70, 45)
    assert forecast.min() >= 0
    padded = pad_to_multiple(frames, model.multiple)
    assert padded[..., 70:, :].sum() == padded[..., 45:].sum() == 0
    with torch.no_grad():
        torch.testing.assert_close(forecast, model(padded)[..., :70, :45].clamp(min=0))
    if kind != "persistence":
        with pytest.raises(UserError, match=f"multiples of {model.multiple}"):
            model(frames)
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        model(frames_of(5))


def test_persistence_repeats_the_last_frame() -> None:
    frames = frames_of(3)
    forecast = Persistence(3, 4)(frames)
    assert forecast.shape == (2, 4, 64, 96)
    assert all(torch.equal(forecast[:, lead], frames[:, -1]) for lead in range(4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _build(translation="transformer"), "translation must be one of conv_tanh"),
        (lambda: _build(output_norm="batch"), "output_norm"),
        (lambda: _build(decoder="deep"), "decoder must be one of unet, light"),
        (lambda: _build(patch=20), "patch=20"),
        (lambda: _build("resnet19"), "unknown encoder"),
        (lambda: _build(out_length=0), "out_length counts frames"),
        (lambda: build_forecaster("convlstm", 3, 3, {}), "unknown kind of model 'convlstm'"),
        (lambda: build_forecaster("smaat", 3, 3, {"width": 8}), "width"),
        (lambda: SmaAtUNet(base_width=0), "base_width"),
        (lambda: _build(decoder_width=32).freeze("head"), "freeze must be one of"),
    ],
)
def test_wrong_values_are_named(call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


def save(path: Path, model: Forecaster, kind: str, options: dict[str, Any], **changes: Any) -> Path:
    about = describe_forecaster("mine", kind, model.in_length, model.out_length, 47.83, options)
    state = {"model." + name: value for name, value in model.state_dict().items()}
    torch.save({"forecaster": about, "state_dict": state} | changes, path)
    return path


@pytest.mark.parametrize(("kind", "options"), [("spatspark", {"decoder_width": 32}), ("smaat", {"base_width": 8})])
def test_a_checkpoint_gives_the_model_back(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_forecaster(kind, 3, 4, options).eval()
    loaded = load_forecaster(save(tmp_path / "best.ckpt", model, kind, options))
    assert (loaded.name, loaded.in_length, loaded.out_length, loaded.scale) == ("mine", 3, 4, 47.83)
    assert loaded.multiple == model.multiple
    assert not loaded.model.training
    frames = frames_of(3)
    assert torch.equal(loaded.model(frames), model(frames))


def test_the_average_is_preferred_to_the_newest_weights(tmp_path: Path) -> None:
    model = SmaAtUNet(3, 4, base_width=8)
    state = {"model." + name: value for name, value in model.state_dict().items()}
    state |= {"ema.module." + name: value + 1 for name, value in model.state_dict().items()}
    state["ema.n_averaged"] = torch.tensor(3)
    path = save(tmp_path / "last.ckpt", model, "smaat", {"base_width": 8}, state_dict=state)
    loaded = load_forecaster(path).model.state_dict()
    assert torch.equal(loaded["head.bias"], model.state_dict()["head.bias"] + 1)


def test_files_that_hold_no_forecaster_are_named(tmp_path: Path) -> None:
    model = SmaAtUNet(3, 4, base_width=8)
    whole = save(tmp_path / "best.ckpt", model, "smaat", {"base_width": 8})
    cases: dict[str, bytes | Any] = {
        "truncated.ckpt": whole.read_bytes()[:5000],
        "text.ckpt": b"no weights here",
        "empty.ckpt": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is damaged or no checkpoint of finetune"):
            load_forecaster(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no checkpoint .*absent"):
        load_forecaster(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_forecaster(tmp_path)
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt is no checkpoint of finetune"):
        load_forecaster(tmp_path / "other.ckpt")
    torch.save({"config": {"mask": {}, "model": {}}, "state_dict": {}}, tmp_path / "pretrained.ckpt")
    with pytest.raises(UserError, match=r"checkpoint of pretrain, .*finetune --init .*pretrained.ckpt"):
        load_forecaster(tmp_path / "pretrained.ckpt")
    wrong = save(tmp_path / "wrong.ckpt", model, "smaat", {"base_width": 16})
    with pytest.raises(UserError, match=r"wrong\.ckpt describes a model that its weights do not fit"):
        load_forecaster(wrong)


def test_a_deep_copy_keeps_what_is_frozen() -> None:
    model = build_spatspark("resnet18", 3, 3, decoder_width=32)
    model.freeze("encoder")
    twin = copy.deepcopy(model).train()
    assert isinstance(twin, SpatSpark)
    assert not twin.encoder.training
    assert model.encoder is not twin.encoder
    assert twin.decoder.training
