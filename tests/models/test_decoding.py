"""The U-Net decoder: the composed upsampling equals its two steps, sparse decoding equals the definition."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patchsparse import PatchGrid, available_backends, image_engine, pack
from spatspark_fast.common.errors import UserError
from spatspark_fast.models import decoder as decoder_module
from spatspark_fast.models.decoder import UNetBlock, UNetDecoder
from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.patch_loss import decoded_loss, patch_errors, reconstruction_loss
from spatspark_fast.models.region import Region, crop
from spatspark_fast.models.spark import SparK, build_spark
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


def bold(model: SparK) -> SparK:
    """Give the norms weights and statistics with which a far pixel still counts."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.3, 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def unet_of(model: SparK) -> UNetDecoder:
    assert isinstance(model.decoder, UNetDecoder)
    return model.decoder


@settings(max_examples=12)
@given(data=st.data(), levels=st.integers(2, 4), rows=st.integers(1, 5), columns=st.integers(1, 7))
def test_a_region_is_what_exact_decoding_makes_of_it_with_frozen_norms(data, levels, rows, columns) -> None:
    """Values and gradients of what is inside, for regions anywhere, at every depth of the encoder."""
    patch = 2 ** (levels + 1)
    model = bold(build_spark(in_chans=3, decoder_width=32, levels=levels, patch=patch).double()).eval()
    frames = make_frames(2, rows * patch, columns * patch)
    grid = PatchGrid.random(2, (rows, columns), keep=0.4)
    shape = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    first = [[data.draw(st.integers(0, n - m)) for n, m in zip((rows, columns), shape, strict=True)] for _ in range(2)]
    region = Region(torch.tensor(first), shape, (rows, columns), patch)
    ours, exact = model(frames, grid, region), model(frames, grid).prediction
    inside = crop(exact, region.whole(), region.extent())
    torch.testing.assert_close(ours.prediction, inside, rtol=1e-9, atol=1e-9)
    errors = patch_errors(exact, frames, (rows, columns))
    counted = torch.zeros_like(errors, dtype=torch.bool)
    for image, (y, x) in enumerate(first):
        counted[image, y : y + shape[0], x : x + shape[1]] = True
    counted &= ~grid.active
    loss = (errors * counted).sum() / counted.sum().clamp(min=1)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-9, atol=1e-9)
    parameters = [p for name, p in model.named_parameters() if "norm" not in name]
    theirs = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(torch.autograd.grad(ours.loss, parameters), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1.0, float(b.abs().max())))


def test_each_block_computes_no_more_around_a_region_than_the_next_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel less around it, and the region is no longer what exact decoding makes of it."""
    model = bold(build_spark(in_chans=3, decoder_width=64).double()).eval()
    frames, grid = make_frames(1, 288, 288), PatchGrid.random(1, (9, 9), keep=0.4)
    region = Region(torch.tensor([[4, 4]]), (1, 1), (9, 9), 32)
    inside = crop(model(frames, grid).prediction, region.whole(), region.extent())
    reads = unet_of(model)._reads()
    assert reads == [(32, 3), (16, 3), (8, 3), (4, 3), (2, 2)]
    for number in range(len(reads)):
        fewer = [(stride, around - (index == number)) for index, (stride, around) in enumerate(reads)]
        monkeypatch.setattr(model.decoder, "_reads", lambda fewer=fewer: fewer)
        assert (model(frames, grid, region).prediction - inside).abs().max() > 1e-9 * inside.abs().max(), number


def test_decoding_a_region_of_everything_trains_as_exact_decoding_does() -> None:
    model = build_spark(in_chans=3, decoder_width=64, loss_on="all").double().train()
    scramble(model)
    twin = copy.deepcopy(model)
    frames, grid = make_frames(2, 64, 96), PatchGrid.random(2, (2, 3), keep=2)
    everything = Region(torch.zeros(2, 2, dtype=torch.long), (2, 3), (2, 3), 32)
    sparse, exact = model(frames, grid, everything), twin(frames, grid)
    torch.testing.assert_close(sparse.prediction, exact.prediction, rtol=1e-9, atol=1e-9)
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


def test_norms_see_pixels_with_real_neighbours_alone() -> None:
    """Their batch statistics are those of pixels that the whole image has too, inside and around the region."""
    model = bold(build_spark(in_chans=3, decoder_width=64).double()).eval()
    frames, grid = make_frames(2, 288, 288), PatchGrid.random(2, (9, 9), keep=0.4)
    region = Region(torch.tensor([[0, 4], [3, 3]]), (2, 3), (9, 9), 32)
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(given[0])

    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        model(frames, grid, region)
        model(frames, grid)
    assert len(seen) == 10
    for name, (part, whole) in seen.items():
        block, which = int(name.split(".")[1]), name[-1]
        stride, around = [*unet_of(model)._reads(), (1, 0)][block + 1]
        extent = region.extent(stride, around + (which == "1"))
        assert part.shape[2:] == extent.size
        torch.testing.assert_close(part, crop(whole, region.whole(stride), extent), rtol=1e-9, atol=1e-9, msg=name)


def test_the_decoded_loss_is_that_of_all_masked_patches() -> None:
    frames, prediction = make_frames(2, 64, 64), make_frames(2, 64, 64, seed=5)
    grid = PatchGrid.random(2, (2, 2), keep=1)
    masked = PatchGrid.from_active(~grid.active)
    ours = decoded_loss(pack(prediction, masked), pack(frames, masked), masked)
    torch.testing.assert_close(ours, reconstruction_loss(prediction, frames, grid))
    everything = PatchGrid.from_active(torch.ones_like(grid.active))
    ours = decoded_loss(pack(prediction, everything), pack(frames, everything), everything, "all")
    torch.testing.assert_close(ours, reconstruction_loss(prediction, frames, grid, "all"))


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_the_light_decoder_draws_masked_patches_alone_and_trains_the_same(backend: str) -> None:
    """By the C++ engine, where there is one, and by PyTorch's own layers; unequal counts per image."""
    model = build_spark(in_chans=3, decoder="light", decoder_width=32, backend=backend).double().train()
    scramble(model)
    twin = copy.deepcopy(model)
    frames = make_frames(2, 64, 96)
    grid = PatchGrid.from_active(torch.tensor([[[1, 0, 0], [0, 1, 0]], [[1, 1, 0], [0, 1, 1]]]).bool())
    _, decoded = masks_of_step(model, MaskSampler(0.67), frames)
    assert isinstance(decoded, PatchGrid)
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
    frames = make_frames(2, 64, 96)
    unet = build_spark(in_chans=3, decoder_width=32)
    light = build_spark(in_chans=3, decoder="light", decoder_width=32)
    everywhere = build_spark(in_chans=3, decoder="light", decoder_width=32, loss_on="all")
    for model, ratio in ((unet, 0.5), (everywhere, 0.5), (light, 0.0)):
        assert masks_of_step(model, MaskSampler(ratio), frames)[1] is None
    grid, found = masks_of_step(light, MaskSampler(0.5), frames)
    assert isinstance(found, PatchGrid)
    assert torch.equal(found.active, ~grid.active)


def test_what_is_decoded_is_new_every_step_and_repeatable() -> None:
    frames, masks = torch.zeros(3, 12, 288, 288), MaskSampler(0.6)
    unet, light = build_spark(decoder_width=32), build_spark(decoder="light", decoder_width=32)
    regions = [masks_of_step(unet, masks, frames, 0.25, step)[1] for step in (0, 0, 1)]
    assert all(isinstance(region, Region) and region.shape == (4, 5) for region in regions)
    first, again, other = (region.first for region in regions if isinstance(region, Region))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    grid, patches = masks_of_step(light, masks, frames, 0.25)
    assert isinstance(patches, PatchGrid)
    assert patches.counts().tolist() == [20, 20, 20]
    assert not (patches.active & grid.active).any()
    _, all_masked = masks_of_step(light, masks, frames, 0.9)
    assert isinstance(all_masked, PatchGrid)
    assert torch.equal(all_masked.active, ~grid.active)


def test_sparse_decoding_of_what_cannot_be_decoded_is_refused() -> None:
    frames, grid = make_frames(2, 64, 96), PatchGrid.random(2, (2, 3), keep=2)
    unet = build_spark(in_chans=3, decoder_width=32).double()
    light = build_spark(in_chans=3, decoder="light", decoder_width=32).double()
    first = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(UserError, match="at least one patch of the same grid"):
        light(frames, grid, PatchGrid.random(2, (3, 2), keep=2))
    with pytest.raises(UserError, match="a region, not a grid of patches"):
        unet(frames, grid, PatchGrid.random(2, (2, 3), keep=2))
    with pytest.raises(UserError, match="draws patches one by one"):
        light(frames, grid, Region(first, (1, 1), (2, 3), 32))
    for wrong in (
        Region(first, (1, 1), (3, 2), 32),
        Region(first, (1, 1), (2, 3), 16),
        Region(first[:1], (1, 1), (2, 3), 32),
    ):
        with pytest.raises(UserError, match="make it with the same numbers"):
            unet(frames, grid, wrong)
