"""The U-Net decoder: the composed upsampling equals its two steps, sparse decoding equals the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patchsparse import PatchGrid, available_backends, image_engine, pack
from spatspark_fast.common.errors import UserError
from spatspark_fast.models import decoder as decoder_module
from spatspark_fast.models.decoder import UNetBlock
from spatspark_fast.models.masks import MaskSampler, patches_to_decode
from spatspark_fast.models.patch_loss import decoded_loss, reconstruction_loss
from spatspark_fast.models.spark import build_spark
from spatspark_fast.models.upsample import pays, upsample_conv

from .parity import make_frames, scramble


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.integers(1, 4),
    out=st.integers(1, 4),
    bias=st.booleans(),
)
def test_the_composed_convolution_is_the_two_steps(batch, height, width, channels, out, bias) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=bias).double()
    conv = nn.Conv2d(channels, out, 3, padding=1, bias=False).double()
    x = torch.randn(batch, channels, height, width, dtype=torch.double, requires_grad=True)
    wanted, ours = conv(up(x)), upsample_conv(x, up, conv)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    inputs = [x, *up.parameters(), *conv.parameters()]
    grad = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 6, 4), (1, 2, 2)])
def test_the_composed_convolution_by_phases_is_the_two_steps(batch, height, width) -> None:
    """32 channels and even sides, where the C++ engine computes the four phases of the enlarged image as channels."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(32, 32, 4, 2, 1).double()
    conv = nn.Conv2d(32, 9, 3, padding=1, bias=False).double()
    x = torch.randn(batch, 32, height, width, dtype=torch.double, requires_grad=True)
    if "cpp" in available_backends():
        assert image_engine(x, 4 * 9)
    wanted, ours = conv(up(x)), upsample_conv(x, up, conv, "auto")
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    inputs = [x, *up.parameters(), *conv.parameters()]
    grad = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_block_composes_only_where_it_pays_and_gives_the_same_either_way(monkeypatch) -> None:
    torch.manual_seed(0)
    block = UNetBlock(4, 2).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.double)
    assert pays(x, block.up)
    assert not pays(x[:1, :, :4, :4], block.up)
    twin = copy.deepcopy(block)
    composed = block(x)
    monkeypatch.setattr(decoder_module, "pays", lambda *_: False)
    torch.testing.assert_close(composed, twin(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.norm1.running_var, twin.norm1.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dense_blocks", [1, 2, 4])
def test_decoding_every_patch_is_the_exact_decoder(dense_blocks: int) -> None:
    model = build_spark(in_chans=3, decoder_width=64, loss_on="all", dense_decoder_blocks=dense_blocks).double().train()
    scramble(model)
    twin = copy.deepcopy(model)
    frames, grid = make_frames(2, 64, 96), PatchGrid.random(2, (2, 3), keep=2)
    everything = PatchGrid.from_active(torch.ones(2, 2, 3, dtype=torch.bool))
    sparse, exact = model(frames, grid, everything), twin(frames, grid)
    torch.testing.assert_close(sparse.prediction, pack(exact.prediction, everything), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sparse.loss, exact.loss, rtol=1e-9, atol=1e-9)
    sparse.loss.backward()
    exact.loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        scale = b.grad.abs().max().clamp(min=1e-3)
        assert (a.grad - b.grad).abs().max() <= 1e-8 * scale, name
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def reference_sparse_decode(model, densified: list[Tensor], decoded: PatchGrid) -> Tensor:
    """Decode whole images, but zero what is outside the decoded patches after every operation of a fine block."""
    *skips, x = densified
    for index, block in enumerate(model.decoder.blocks):
        if index > 0 and skips:
            x = x + skips.pop()
        if index < model.decoder.dense_blocks:
            x = block(x)
            continue

        def visible(y: Tensor) -> Tensor:
            return y * decoded.pixels(y.shape[2:])[:, None]

        def norm(layer: nn.BatchNorm2d, y: Tensor) -> Tensor:
            rows = pack(y, decoded)
            mean, var = rows.mean((0, 2, 3), keepdim=True), rows.var((0, 2, 3), correction=0, keepdim=True)
            return (y - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

        x = visible(block.conv1(visible(block.up(visible(x)))))
        x = visible(block.conv2(visible(torch.nn.functional.leaky_relu(norm(block.norm1, x)))))
        x = norm(block.norm2, x)
    return pack(model.decoder.head(x), decoded)


def test_sparse_decoding_reads_halos_from_the_decoded_patches_alone() -> None:
    model = build_spark(in_chans=3, decoder_width=64).double().train()
    scramble(model)
    frames, grid = make_frames(2, 96, 96), PatchGrid.random(2, (3, 3), keep=3)
    decoded = PatchGrid.from_active(~grid.active & (torch.arange(9).reshape(3, 3) % 4 != 0))
    with torch.no_grad():
        output = model(frames, grid, decoded)
        densified = model.densify(model.encode(pack(frames, grid), grid), grid)
        wanted = reference_sparse_decode(model, densified, decoded)
    torch.testing.assert_close(output.prediction, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.loss, decoded_loss(wanted, pack(frames, decoded), decoded), rtol=1e-9, atol=1e-9)


def test_the_decoded_loss_estimates_that_of_all_masked_patches() -> None:
    frames, prediction = make_frames(2, 64, 64), make_frames(2, 64, 64, seed=5)
    grid = PatchGrid.random(2, (2, 2), keep=1)
    masked = PatchGrid.from_active(~grid.active)
    ours = decoded_loss(pack(prediction, masked), pack(frames, masked), masked)
    torch.testing.assert_close(ours, reconstruction_loss(prediction, frames, grid))
    everything = PatchGrid.from_active(torch.ones_like(grid.active))
    ours = decoded_loss(pack(prediction, everything), pack(frames, everything), everything, "all")
    torch.testing.assert_close(ours, reconstruction_loss(prediction, frames, grid, "all"))


def test_decoded_patches_are_masked_new_every_step_and_repeatable() -> None:
    sampler, frames = MaskSampler(0.6), torch.zeros(3, 12, 288, 288)
    grid = sampler(frames, step=0)
    first, again = (sampler.decoded(grid, 0.25, step=0) for _ in range(2))
    assert torch.equal(first.active, again.active)
    assert not (first.active & grid.active).any()
    assert first.counts().tolist() == [20, 20, 20]
    assert not torch.equal(first.active, sampler.decoded(grid, 0.25, step=1).active)
    assert sampler.decoded(grid, 0.9, step=0).counts().tolist() == [49, 49, 49]  # all masked ones
    anywhere = sampler.decoded(grid, 0.9, step=0, masked=False)
    assert anywhere.counts().tolist() == [73, 73, 73]


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_the_light_decoder_draws_masked_patches_alone_and_trains_the_same(backend: str) -> None:
    """By the C++ engine, where there is one, and by PyTorch's own layers; unequal counts per image."""
    model = build_spark(in_chans=3, decoder="light", decoder_width=32, backend=backend).double().train()
    scramble(model)
    twin = copy.deepcopy(model)
    frames = make_frames(2, 64, 96)
    grid = PatchGrid.from_active(torch.tensor([[[1, 0, 0], [0, 1, 0]], [[1, 1, 0], [0, 1, 1]]]).bool())
    decoded = patches_to_decode(model, MaskSampler(0.5), PatchGrid.random(2, (2, 3), keep=2), 1.0, step=0)
    assert decoded is not None
    assert decoded.counts().tolist() == [4, 4]
    alone, whole = model(frames, grid, grid.complement()), twin(frames, grid)
    torch.testing.assert_close(alone.prediction, pack(whole.prediction, grid.complement()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone.loss, whole.loss, rtol=1e-9, atol=1e-9)
    alone.loss.backward()
    whole.loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_whole_images_are_decoded_where_the_loss_reads_them_or_nothing_is_masked() -> None:
    masks, grid = MaskSampler(0.5), PatchGrid.random(2, (2, 3), keep=2)
    unet = build_spark(in_chans=3, decoder_width=32)
    light = build_spark(in_chans=3, decoder="light", decoder_width=32)
    everywhere = build_spark(in_chans=3, decoder="light", decoder_width=32, loss_on="all")
    for model, seen in ((unet, grid), (everywhere, grid), (light, PatchGrid.random(2, (2, 3), keep=1.0))):
        assert patches_to_decode(model, masks, seen, 1.0, step=0) is None
    found = patches_to_decode(light, masks, grid, 1.0, step=0)
    assert found is not None
    assert torch.equal(found.active, ~grid.active)


def test_sparse_decoding_of_what_cannot_be_decoded_is_refused() -> None:
    frames, grid = make_frames(2, 64, 96), PatchGrid.random(2, (2, 3), keep=2)
    unet = build_spark(in_chans=3, decoder_width=32).double()
    with pytest.raises(UserError, match="at least one patch of the same grid"):
        unet(frames, grid, PatchGrid.random(2, (3, 2), keep=2))
    with pytest.raises(UserError, match="dense_decoder_blocks=5 must be at least 1 and below 5"):
        build_spark(in_chans=3, decoder_width=32, dense_decoder_blocks=5)
