"""SparK as a user meets it: any size, dense path, pictures, wrong input, full size."""

from __future__ import annotations

import copy

import pytest
import torch

from patchsparse import PatchGrid, pack, unpack
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.choices import DecoderKind
from spatspark_fast.models.masks import MaskSampler
from spatspark_fast.models.patch_loss import patchify
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import Observer, build_spark

from .parity import make_frames, scramble


def test_full_size_step_of_the_published_model() -> None:
    """12 frames of 288x288, ResNet-18, U-Net of width 768: one step trains every parameter."""
    torch.manual_seed(0)
    model = build_spark().train()
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # timm's 0 would keep residual branches out of the first step
            torch.nn.init.ones_(module.weight)
    frames = torch.rand(2, 12, 288, 288, generator=torch.Generator().manual_seed(0))
    output = model(frames, MaskSampler(0.6)(frames, step=0))
    output.loss.backward()
    assert output.prediction.shape == frames.shape
    # An untrained decoder predicts about 0, and targets have mean square 1.
    assert output.loss.item() == pytest.approx(1.0, abs=0.2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dense_path_equals_everything_active(encoder: str, mode: str) -> None:
    model = build_spark(encoder, in_chans=3, decoder_width=64).double().train(mode == "train")
    scramble(model)
    twin = copy.deepcopy(model)
    frames = make_frames(2, 64, 96)
    grid = PatchGrid.random(2, (2, 3), keep=6)
    sparse = model.encode(pack(frames, grid), grid)
    for packed, dense in zip(sparse, twin.encode_dense(frames), strict=True):
        torch.testing.assert_close(unpack(packed, grid), dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(frames, grid).prediction, twin.forward_dense(frames), rtol=1e-9, atol=1e-9)


def test_what_is_masked_is_not_seen() -> None:
    model = build_spark(in_chans=3, decoder_width=64).eval()
    frames = make_frames(2, 64, 96, torch.float32)
    grid = PatchGrid.random(2, (2, 3), keep=2)
    hidden = torch.where(grid.pixels(frames.shape[2:]).unsqueeze(1), frames, torch.nan)
    with torch.no_grad():
        seen = model(frames, grid).prediction
        assert torch.equal(model(hidden, grid).prediction, seen)


@pytest.mark.parametrize("decoder", ["unet", "light"])
@pytest.mark.parametrize(("patch", "levels", "size"), [(32, 4, (32, 96)), (96, 4, (96, 192)), (4, 1, (12, 8))])
def test_sizes(decoder: DecoderKind, patch: int, levels: int, size: tuple[int, int]) -> None:
    model = build_spark("resnet18", 7, patch, decoder, decoder_width=32, levels=levels)
    frames = torch.rand(3, 7, *size)
    output = model(frames, MaskSampler(0.5, patch=patch)(frames, step=0))
    assert output.prediction.shape == frames.shape
    assert output.loss.isfinite()


def test_light_decoder_has_no_idle_parameters() -> None:
    model = build_spark(in_chans=3, decoder="light", decoder_width=32)
    assert len(model.densify.levels) == 1
    frames = make_frames(2, 64, 64, torch.float32)
    model(frames, PatchGrid.random(2, (2, 2), keep=2)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_reconstruction_is_in_data_units() -> None:
    model = build_spark(in_chans=3, decoder_width=32).eval()
    frames = 40 + 5 * make_frames(2, 64, 96, torch.float32)
    grid = PatchGrid.random(2, (2, 3), keep=2)
    picture = model.reconstruct(frames, grid)
    visible = grid.pixels(frames.shape[2:]).unsqueeze(1).expand_as(frames)
    assert torch.equal(picture[visible], frames[visible])
    everything = model.reconstruct(frames, grid, keep_visible=False)
    assert torch.equal(picture[~visible], everything[~visible])
    assert not torch.equal(everything[visible], frames[visible])
    prediction = patchify(model(frames, grid).prediction, (2, 3))[1, 1, 2]
    truth = frames[1, :, 32:, 64:]
    expected = prediction * (truth.var() + 1e-6).sqrt() + truth.mean()
    torch.testing.assert_close(everything[1, :, 32:, 64:], expected)


def test_bfloat16_autocast_trains() -> None:
    model = build_spark(in_chans=3, decoder_width=32)
    frames = make_frames(2, 64, 96, torch.float32)
    grid = PatchGrid.random(2, (2, 3), keep=3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(frames, grid)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_masked_trains_with_zero_loss() -> None:
    model = build_spark(in_chans=3, decoder="light", decoder_width=32)
    frames = make_frames(2, 64, 64, torch.float32)
    output = model(frames, PatchGrid.random(2, (2, 2), keep=4))
    output.loss.backward()
    assert output.loss.item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 48}, r"patch=48 .*deepest stride 32: choose a multiple of 32, or levels=3 \(deepest stride 16\)"),
        ({"patch": 0}, "patch=0"),
        ({"patch": 30}, "patch=30 .* choose a multiple of 32$"),
        ({"levels": 5}, "levels must be 1, 2, 3 or 4"),
        ({"decoder": "heavy"}, "'heavy'"),
        ({"decoder_width": 100}, "decoder_width=100 halves 5 times: choose a multiple of 32"),
        ({"loss_on": "visible"}, "'visible'"),
        ({"encoder": "resnet19"}, "unknown encoder 'resnet19'"),
    ],
)
def test_models_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_spark(**arguments)  # type: ignore[arg-type]


def test_frames_that_do_not_fit() -> None:
    model = build_spark(in_chans=3, decoder="light", decoder_width=32)
    grid = PatchGrid.random(2, (2, 2), keep=2)
    with pytest.raises(UserError, match=r"frames must be \(B, 3, H, W\) for this model, got \(2, 4, 64, 64\)"):
        model(torch.zeros(2, 4, 64, 64), grid)
    with pytest.raises(UserError, match=r"70 x 64 pixels cannot be cut into patches of 32.*64 x 64 or 96 x 64"):
        model(torch.zeros(2, 3, 70, 64), grid)
    with pytest.raises(UserError, match=r"the grid is \(2, 2, 2\).*need \(2, 2, 3\)"):
        model(torch.zeros(2, 3, 64, 96), grid)
    with pytest.raises(UserError, match="1 visible patch"):
        model(torch.zeros(1, 3, 64, 64), PatchGrid.random(1, (2, 2), keep=1))


class Hearing(Observer):
    """Remember what was heard, and hand the decoder other features."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def started(self) -> None:
        self.heard.append("started")

    def encoded(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        self.heard.append("encoded")
        return [torch.zeros_like(feature) for feature in features]

    def decoded(self) -> None:
        self.heard.append("decoded")


def test_an_observer_hears_where_the_parts_end_and_may_replace_the_features() -> None:
    model = build_spark("resnet10t", in_chans=3, decoder_width=64).eval()
    frames = make_frames(1, 64, 64, torch.float32)
    grid = PatchGrid.random(1, (2, 2), keep=2, generator=torch.Generator().manual_seed(0))
    zeros = [torch.zeros_like(feature) for feature in model.encode(pack(frames, grid), grid)]
    model.observer = observer = Hearing()
    with torch.no_grad():
        observed = model(frames, grid).prediction
        torch.testing.assert_close(observed, model.decoder(model.densify(zeros, grid)))
        model(frames, grid, Region(torch.zeros(1, 2, dtype=torch.long), (1, 1), (2, 2), 32))
    assert observer.heard == ["started", "encoded", "decoded"] * 2
