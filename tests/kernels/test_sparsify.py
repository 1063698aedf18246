"""sparsify: what it keeps, what it refuses, and what verification finds."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.blur_pool import BlurPool2d
from timm.layers.drop import DropBlock2d
from torch import Tensor, nn

import patchsparse
from patchsparse import PatchGrid, UnsupportedModuleError, bind, pack, sparsify
from patchsparse.adoption.binding import bindings_of
from patchsparse.adoption.modules import PatchConv2d, PatchModule
from patchsparse.adoption.parity import check_parity

from .sparsify_cases import UNEQUAL, assert_close, assert_parity, encoder, images


class Hidden(nn.Module):
    """A block whose forward hides a functional call."""

    def __init__(self, kind: str):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "mean":
            return y * y.mean((2, 3), keepdim=True)
        if self.kind == "pool":
            return F.max_pool2d(y, 3, 1, 1)
        return y - y.mean(dim=1, keepdim=True)  # over channels: harmless


class Doubled(nn.Module):
    """An activation that no rule knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Vouched(Doubled):
    """The same, with the promise that it acts on each pixel by itself."""

    patchsparse_pointwise = True


def state(model: nn.Module) -> list[tuple[str, int, type]]:
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


def test_parameters_hooks_keys_and_answers_to_isinstance_stay() -> None:
    model = encoder("resnet18").float()
    plain = copy.deepcopy(model)
    calls: list[str] = []
    model.conv1.register_forward_hook(lambda *_: calls.append("conv1"))  # type: ignore[union-attr]
    modules = [id(m) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    assert sparsify(model) is model
    assert [id(m) for m in model.modules()] == modules
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model.conv1, nn.Conv2d)
    assert isinstance(model.conv1, PatchConv2d)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model(images(UNEQUAL, 32, dtype=torch.float32))
    assert calls == ["conv1"]
    assert type(model.layer1[0].conv1) is PatchConv2d  # type: ignore[index, union-attr]
    assert type(model.layer2[0].downsample[0]) is PatchConv2d  # type: ignore[index, union-attr]


def test_pixelwise_modules_stay() -> None:
    model = sparsify(encoder("convnext_atto"))
    assert not any(isinstance(m, PatchModule) for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_a_pointwise_convolution_takes_packed_patches_and_one_pixel_per_image() -> None:
    conv = nn.Conv2d(3, 4, 1).double()
    head = sparsify(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), conv).double())
    plain = nn.Conv2d(3, 4, 1).double()
    plain.load_state_dict(conv.state_dict())
    grid = PatchGrid.from_active(UNEQUAL)
    x = images(UNEQUAL, 8)
    with bind(head, grid):
        assert torch.allclose(conv(pack(x, grid)), pack(plain(x), grid), rtol=1e-12)
        assert head(pack(x, grid)).shape == (len(UNEQUAL), 4, 1, 1)


def test_a_lone_module_is_adopted_in_place_and_shared_ones_once() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    assert sparsify(conv) is conv
    assert type(conv) is PatchConv2d
    shared = nn.Conv2d(3, 3, 3, padding=1).double()
    assert_parity(nn.Sequential(shared, nn.ReLU(), shared), UNEQUAL, 4)


def test_a_deep_copy_is_independent_and_starts_unbound() -> None:
    model = sparsify(encoder("resnet18"))
    grid = PatchGrid.from_active(UNEQUAL)
    x = images(UNEQUAL, 32)
    with bind(model, grid):
        clone = copy.deepcopy(model)
        assert bindings_of(clone)[0].grid is None
        assert len(bindings_of(clone)) == 1
        clone(x)  # dense, while the original is bound
        packed = model(pack(x, grid))
    with bind(clone, grid):
        again = clone(pack(x, grid))
        model(x)
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))


def test_pickle_and_torch_save_keep_the_model_sparsified() -> None:
    model = sparsify(encoder("regnety_002"), backend="gather")
    grid = PatchGrid.from_active(UNEQUAL)
    x = pack(images(UNEQUAL, 32), grid)
    buffer = io.BytesIO()
    with bind(model, grid):
        torch.save(model, buffer)
        copies = [pickle.loads(pickle.dumps(model)), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)]
        expected = model.eval()(x)
    for clone in copies:
        assert bindings_of(clone)[0].backend == "gather"
        with bind(clone.eval(), grid):
            for ours, theirs in zip(clone(x), expected, strict=True):
                assert ours.shape == theirs.shape


def test_explicit_backends_agree() -> None:
    grid = PatchGrid.from_active(UNEQUAL)
    x = pack(images(UNEQUAL, 32), grid)
    features = []
    for backend in ("gather", "dense"):
        model = sparsify(encoder("resnet18"), backend=backend)
        with bind(model, grid):
            features.append(model(x))
    for ours, theirs in zip(*features, strict=True):
        assert_close(ours, theirs, 0.0, "feature")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 4, 3), "padding"),
        (nn.Conv2d(3, 4, 3, stride=2), "padding"),
        (nn.Conv2d(3, 4, 2, padding="same"), "even kernel"),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), "kernel"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.AdaptiveAvgPool2d(2), "output_size=2"),
        (nn.AdaptiveMaxPool2d(1), "no rule"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "bilinear"),
        (nn.Upsample(size=(8, 8)), "scale_factor=None"),
        (nn.LayerNorm([4, 8, 8]), "normalized_shape"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "running statistics"),
        (nn.Softmax(dim=-1), "dim=-1"),
        (nn.MultiheadAttention(4, 1), "attention"),
        (nn.ZeroPad2d(1), "give it to the convolution"),
        (DropBlock2d(), "DropBlock"),
        (BlurPool2d(3), "pad_mode='reflect'"),
        (Doubled(), "no rule"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)), "parametrization after"),
        (Hidden("mean"), "y.mean"),
        (Hidden("channels"), "verify=True"),
    ],
)
def test_what_cannot_be_equal_is_refused_and_left_untouched(module: nn.Module, message: str) -> None:
    model = nn.ModuleDict({"good": nn.Conv2d(3, 3, 3, padding=1), "odd": module})
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match=message) as caught:
        sparsify(model)
    assert caught.value.path == "odd"
    assert "'odd'" in str(caught.value)
    assert state(model) == before


def test_a_forward_on_the_instance_is_refused() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    conv.forward = lambda input: input  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModuleError, match="on the instance"):
        sparsify(conv)


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base() -> None:
    class Odd(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.flip(2))

    class Named(nn.Conv2d):
        """Only a name."""

    with pytest.raises(UnsupportedModuleError, match="no rule"):
        sparsify(nn.Sequential(Odd(3, 3, 3, padding=1)))
    assert isinstance(sparsify(Named(3, 3, 3, padding=1)), PatchConv2d)


def test_sparsifying_twice_is_an_error() -> None:
    model = sparsify(encoder("resnet18"))
    with pytest.raises(ValueError, match="already"):
        sparsify(model)


def test_sparsify_is_a_function_and_no_module() -> None:
    assert callable(patchsparse.sparsify)
    with pytest.raises(ModuleNotFoundError, match=r"patchsparse\.sparsify"):
        importlib.import_module("patchsparse.sparsify")


def test_an_unknown_backend_is_an_error_before_anything_changes() -> None:
    model = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match=r"'quick' is unknown; choose one of auto, .*gather"):
        sparsify(model, backend="quick")
    assert type(model) is nn.Conv2d


@pytest.mark.parametrize("kind", ["mean", "pool"])
def test_verification_names_the_module_with_the_hidden_call(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Hidden(kind), nn.ReLU())
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match=r"'1' \(.*Hidden\)"):
        sparsify(model, verify=True)
    assert state(model) == before


def test_verification_blames_the_caller_for_a_wrong_input() -> None:
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.roll(1, 2))

    with pytest.raises(UnsupportedModuleError, match=r"'0' \(.*call of '0.conv'"):
        sparsify(nn.Sequential(Shifted()), verify=True)


def test_verification_clears_a_harmless_call_and_disturbs_nothing() -> None:
    model = nn.Sequential(Hidden("channels"), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.GroupNorm(2, 4)).eval()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sparsify(model, verify=True)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert not model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model[0].conv, PatchConv2d)


def test_verification_finds_larger_patches_and_says_what_the_model_needs() -> None:
    check_parity(nn.Sequential(nn.Conv2d(3, 4, 64, stride=64), nn.ReLU()))
    with pytest.raises(UnsupportedModuleError, match="does not divide the patch"):
        check_parity(nn.Conv2d(3, 4, 64, stride=64), patch_size=32)
    with pytest.raises(ValueError, match="in_channels"):
        check_parity(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="does not run on an input"):
        check_parity(nn.Conv2d(3, 4, 1), in_channels=5)
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        check_parity(nn.Conv2d(3, 4, 1))


def test_a_class_may_vouch_for_itself() -> None:
    assert_parity(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Vouched()).double(), UNEQUAL, 4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 5, padding="same"),
        nn.Conv2d(4, 6, (3, 5), (1, 2), (1, 2)),
        nn.Conv2d(4, 8, 3, 2, 2, dilation=2, groups=4),
        nn.Conv2d(4, 6, 2, 2),
        nn.Conv2d(4, 6, 1, 2),
        nn.ConvTranspose2d(4, 6, 4, 2, 1),
        nn.ConvTranspose2d(4, 6, 2, 2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, 0, ceil_mode=True),
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.GroupNorm(2, 4),
        nn.GroupNorm(4, 4, affine=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2),
        nn.PixelUnshuffle(2),
        BlurPool2d(4, pad_mode="constant"),
    ],
    ids=str,
)
def test_layer_equals_dense_and_mask(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer).double()
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        model.append(nn.Conv2d(4, 5, 1).double())
        check_parity(model)  # one value per image: nothing to pack in the reference
    elif isinstance(layer, BlurPool2d):
        check_parity(model)
    else:
        assert_parity(model, UNEQUAL, 8)


def test_dropout2d_drops_channels_of_whole_images() -> None:
    model = sparsify(nn.Dropout2d(0.5)).train()
    grid = PatchGrid.from_active(UNEQUAL)
    x = torch.ones(2, 16, 8, 12)
    torch.manual_seed(0)
    dense = model(x)
    torch.manual_seed(0)
    with bind(model, grid):
        packed = model(pack(x, grid))
    assert torch.equal(packed, pack(dense, grid))
    assert 0 < int((packed == 0).sum()) < packed.numel()


def test_an_image_never_sees_another_ones_nan() -> None:
    model = sparsify(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)))
    squeeze = sparsify(timm.create_model("regnety_002", features_only=True).eval())
    grid = PatchGrid.from_active(UNEQUAL)
    x = images(UNEQUAL, 32, dtype=torch.float32)
    x[1] = float("nan")
    for network in (model, squeeze):
        with bind(network, grid):
            output = network(pack(x, grid))
        last = output[-1] if isinstance(output, list) else output
        assert torch.isfinite(last[grid.image == 0]).all()
        assert torch.isnan(last[grid.image == 1]).any()


def test_global_response_norm_has_no_nan_gradient_at_dead_channels() -> None:
    model = sparsify(encoder("convnextv2_atto"))
    grid = PatchGrid.from_active(UNEQUAL)
    with bind(model, grid):
        features = model(pack(torch.zeros(2, 3, 64, 96, dtype=torch.float64), grid))
    torch.stack([f.sum() for f in features]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
