"""The maps of a grid: checked once, for every engine and every operator that takes them; grids are immutable."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from patchsparse import PatchGrid, bind, maps, pack, patch_avg_pool2d, patch_conv2d, patch_max_pool2d, sparsify, unpack
from patchsparse.backends import cpp, gather, tables
from patchsparse.backends.cpp import library, native, plans
from patchsparse.geometry import Stencil

from .test_conv import ENGINES

SAME = Stencil((3, 3), padding=(1, 1))
STENCIL = ([3, 3], [1, 1], [1, 1], [1, 1])
COMPILED = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))


def grid() -> PatchGrid:
    return PatchGrid.from_active(torch.tensor([[[True, False], [True, True]], [[False, True], [True, False]]]))


def operators(slot: Tensor, coords: Tensor, backend: str) -> dict:
    """Return a call of every registered operator that takes maps: N = 5 patches of 2x2 pixels, 4 channels."""
    x, weight, ops = torch.ones(5, 4, 2, 2), torch.ones(4, 4, 3, 3), torch.ops.patchsparse
    pair, tap = (slot, coords), torch.zeros(5, 4, 2, 2, dtype=torch.uint8)
    conv, statistics = (*STENCIL[1:], 1, backend), (torch.zeros(4), torch.ones(4))
    return {
        "conv2d": lambda: ops.conv2d(x, weight, None, *pair, *conv),
        "conv2d_dgrad": lambda: ops.conv2d_dgrad(x, weight, *pair, *conv),
        "conv2d_wgrad": lambda: ops.conv2d_wgrad(x, x, *pair, STENCIL[0], *conv),
        "conv2d_gradients": lambda: ops.conv2d_gradients(x, x, weight, *pair, *conv[:-1], "gather"),
        "max_pool2d": lambda: ops.max_pool2d(x, *pair, *STENCIL, backend),
        "max_pool2d_grad": lambda: ops.max_pool2d_grad(x, tap, *pair, *STENCIL, backend),
        "avg_pool2d": lambda: ops.avg_pool2d(x, *pair, *STENCIL[:3], 9, True, backend),
        "avg_pool2d_grad": lambda: ops.avg_pool2d_grad(x, *pair, *STENCIL[:3], 9, True, backend),
        "pack": lambda: ops.pack(torch.ones(2, 4, 4, 4), *pair),
        "unpack": lambda: ops.unpack(x, None, *pair),
        "batch_norm_unpack": lambda: ops.batch_norm_unpack(x, None, None, None, None, None, *pair, 1e-5, backend),
        "batch_norm_unpack_grad": lambda: ops.batch_norm_unpack_grad(
            torch.ones(2, 4, 4, 4), x, None, *statistics, *pair, 1e-5, True, backend
        ),
    }


def with_value(x: Tensor, at: tuple[int, ...], value: int) -> Tensor:
    changed = x.clone()
    changed[at] = value
    return changed


LARGE = 2**31 - 1
WRONG = {
    "slot int64": (lambda s, c: (s.long(), c), TypeError, "slot must be int32, got torch.int64"),
    "coords int64": (lambda s, c: (s, c.long()), TypeError, "coords must be int32"),
    "coords bool": (lambda s, c: (s, c.bool()), TypeError, "coords must be int32"),
    "slot of one image": (lambda s, c: (s[0], c), ValueError, r"slot must be \(B, Gh, Gw\)"),
    "coords with four columns": (lambda s, c: (s, torch.cat((c, c[:, :1]), 1)), ValueError, r"coords \(N, 3\)"),
    "coords on meta": (lambda s, c: (s, c.to("meta")), ValueError, "meta"),
    "coords not contiguous": (lambda s, c: (s, c.t().contiguous().t()), ValueError, "contiguous"),
    "slot not contiguous": (lambda s, c: (s.mT.contiguous().mT, c), ValueError, "contiguous"),
    "slot too large": (lambda s, c: (with_value(s, (0, 0, 0), 5), c), ValueError, "slot does not hold"),
    "slot far away": (lambda s, c: (with_value(s, (0, 0, 1), LARGE), c), ValueError, "slot names more"),
    "slot very negative": (lambda s, c: (with_value(s, (0, 0, 1), -7), c), ValueError, "another number than -1"),
    "image negative": (lambda s, c: (s, with_value(c, (0, 0), -1)), ValueError, "outside of"),
    "image far away": (lambda s, c: (s, with_value(c, (3, 0), LARGE)), ValueError, "outside of"),
    "row far away": (lambda s, c: (s, with_value(c, (1, 1), 10**6)), ValueError, "outside of"),
    "column of the next row": (lambda s, c: (s, with_value(c, (2, 2), 2)), ValueError, "outside of"),
    "two rows of one patch": (lambda s, c: (s, with_value(c, (1, 1), 0)), ValueError, "slot does not hold"),
    "rows exchanged": (lambda s, c: (s, c.flip(0)), ValueError, "slot does not hold"),
    "fewer coords": (lambda s, c: (s, c[:4]), ValueError, "slot names more|with N=4"),
    "more coords": (lambda s, c: (s, torch.cat((c, c[:1]))), ValueError, "slot does not hold|with N=6"),
}


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("wrong", WRONG)
def test_no_operator_follows_wrong_maps(backend, wrong):
    change, error, message = WRONG[wrong]
    right = grid()
    slot, coords = change(right.slot, right.coords)
    for name, call in operators(slot, coords, backend).items():
        with pytest.raises(error, match=f"{message}|bring them to one device"):
            call()
        operators(right.slot, right.coords, backend)[name]()
    with pytest.raises(error, match=message):
        PatchGrid(right.active, coords, slot)


@pytest.mark.parametrize("wrong", WRONG)
def test_no_list_of_rows_is_built_of_wrong_maps(wrong):
    change, error, message = WRONG[wrong]
    right, x, weight = grid(), torch.ones(5, 4, 2, 2), torch.ones(4, 4, 3, 3)
    slot, coords = change(right.slot, right.coords)
    engines = [gather] if library.load().problem else [gather, cpp]
    for engine in engines:
        with pytest.raises(error, match=message):
            engine.conv2d(x, weight, None, slot, coords, SAME, 1)
    with pytest.raises(error, match=message):
        tables.tap_pairs(slot, coords, (2, 2), SAME)


@COMPILED
@pytest.mark.parametrize("wrong", [name for name, (_, error, _) in WRONG.items() if error is ValueError])
def test_the_compiled_engine_never_leaves_the_packed_rows(wrong, monkeypatch):
    """Past every check of Python: what its own check lets through, it computes without leaving its memory."""
    monkeypatch.setattr(plans, "check_maps", lambda slot, coords: None)
    right = grid()
    slot, coords = WRONG[wrong][0](right.slot, right.coords)
    if slot.dim() != 3 or coords.is_meta or not (slot.is_contiguous() and coords.is_contiguous()):
        return  # only values are the library's to check
    led_away = bool((slot >= coords.shape[0]).any() | (coords < 0).any() | (coords >= 2).any())
    for lists in (native.NO_LISTS, native.GROUPS, native.SQUARES):
        if led_away:
            with pytest.raises(ValueError, match="the C\\+\\+ engine found maps or numbers out of range"):
                plans.plan_for(slot, coords[:, :3].contiguous(), (2, 2), SAME, False, lists)
        else:
            plans.plan_for(slot, coords[:, :3].contiguous(), (2, 2), SAME, False, lists)


@COMPILED
@pytest.mark.parametrize(
    "numbers",
    [
        {"patches": -1},
        {"images": 1},
        {"grid_rows": 0},
        {"lists": 9},
        {"source": (0, 2)},
        {"source": (2**16, 2**16)},
        {"kernel": (0, 3)},
        {"kernel": (2**20, 2**20)},
        {"stride": (0, 1)},
        {"padding": (-1, 1)},
        {"dilation": (2**31 - 1, 1)},
        {"padding": (2**31 - 1, 1)},
        {"stride": (2**30, 1), "adjoint": 1},
    ],
)
def test_the_compiled_engine_refuses_numbers_out_of_range(numbers):
    right = grid()
    fields = {"images": 2, "patches": 5, "grid_rows": 2, "grid_columns": 2, "adjoint": 0, "lists": native.GROUPS}
    fields |= {"source": (2, 2), "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    plans.Plan(right.slot, right.coords, native.Geometry(**fields))
    with pytest.raises(ValueError, match="out of range"):
        plans.Plan(right.slot, right.coords, native.Geometry(**{**fields, **numbers}))


def test_maps_are_looked_at_once_and_again_when_they_change(monkeypatch):
    looked = []
    wrong_values = maps._wrong_values
    monkeypatch.setattr(maps, "_wrong_values", lambda *pair: looked.append(pair) or wrong_values(*pair))
    made, other = grid(), grid()
    x, weight = torch.randn(5, 4, 2, 2), torch.randn(4, 4, 3, 3, requires_grad=True)
    for _ in range(2):
        for which in (made, other, made):
            patch_conv2d(x, weight, None, which, padding=1).sum().backward()
            unpack(patch_max_pool2d(x, which, 3, 1, 1), which)
    assert not looked  # right by construction
    raw = (made.slot.clone(), made.coords.clone())
    for _ in range(3):
        torch.ops.patchsparse.unpack(x, None, *raw)
    assert len(looked) == 1
    raw[1][0] = 0
    raw[0][raw[0] == 0] = 0
    for _ in range(2):
        torch.ops.patchsparse.unpack(x, None, *raw)
    assert len(looked) == 2
    raw[0][0, 0, 0] = 4
    for _ in range(2):
        with pytest.raises(ValueError, match="not the maps of a grid"):
            torch.ops.patchsparse.unpack(x, None, *raw)


def test_no_attribute_of_a_grid_can_be_changed():
    fixed = grid()
    for name in ("active", "slot", "coords", "shape", "anything"):
        with pytest.raises(AttributeError, match=f"a PatchGrid is immutable: {name} cannot be changed"):
            setattr(fixed, name, None)
    with pytest.raises(AttributeError, match="immutable"):
        del fixed.slot
    for again in (copy.copy(fixed), copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(again.slot, fixed.slot)
        assert unpack(torch.ones(5, 1, 2, 2), again).sum() == 20


def test_a_grid_does_not_follow_the_tensor_that_it_was_made_from():
    active = torch.tensor([[[True, False, True]]])
    made = PatchGrid.from_active(active)
    active[:] = False
    assert made.active.tolist() == [[[True, False, True]]]
    assert made.pixels((1, 3)).sum() == made.num_active == 2


def test_maps_that_disagree_make_no_grid():
    right = grid()
    with pytest.raises(ValueError, match="active and slot disagree"):
        PatchGrid(~right.active, right.coords, right.slot)
    with pytest.raises(ValueError, match=r"active must be \(2, 2, 2\) bool"):
        PatchGrid(right.active.int(), right.coords, right.slot)
    with pytest.raises(ValueError, match="per_image is 2"):
        PatchGrid(right.active, right.coords, right.slot, per_image=2)
    with pytest.raises(TypeError, match="must be tensors"):
        PatchGrid(right.active.tolist(), right.coords, right.slot)  # pyright: ignore[reportArgumentType]


CONSTRUCTORS = {
    "random": lambda: PatchGrid.random(2, (2, 2), keep=2),
    "from_scores": lambda: PatchGrid.from_scores(torch.rand(2, 2, 2), 2),
    "from_active": lambda: PatchGrid.from_active(torch.rand(2, 2, 2) < 0.7),
    "complement": lambda: grid().complement(),
    "complement of a number": lambda: PatchGrid.random(2, (2, 2), keep=2).complement(),
    "permute": lambda: grid().permute(torch.arange(5).flip(0)),
    "to": lambda: PatchGrid.random(2, (2, 2), keep=2).to("cpu"),
    "from_active, to": lambda: PatchGrid.from_active(torch.ones(2, 2, 2, dtype=torch.bool)).to("cpu"),
    "maps": lambda: PatchGrid(grid().active.clone(), grid().coords.clone(), grid().slot.clone()),
}


def trained(on: PatchGrid, image: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    """Return a loss that goes through every function, and its gradients."""
    x = patch_conv2d(pack(image, on), weight, None, on, padding=1, backend=backend).relu()
    x = patch_avg_pool2d(patch_max_pool2d(x, on, 3, 1, 1, backend=backend), on, 3, 1, 1)
    loss = unpack(x, on).square().sum()
    return [loss, *torch.autograd.grad(loss, weight)] if torch.is_grad_enabled() else [loss]


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("made", CONSTRUCTORS)
def test_a_grid_serves_inference_and_training_wherever_it_was_made(backend, made):
    image, weight = torch.randn(2, 64, 4, 4), torch.randn(64, 64, 3, 3).div(24).requires_grad_()
    with torch.inference_mode():
        torch.manual_seed(0)
        inside = CONSTRUCTORS[made]()
        first = trained(inside, image, weight, backend)  # fills what is remembered of the grid
    torch.manual_seed(0)
    outside = CONSTRUCTORS[made]()
    assert torch.equal(inside.slot, outside.slot)
    expected = trained(outside, image, weight, backend)
    for a, b in zip(trained(inside, image, weight, backend), expected, strict=True):
        assert torch.equal(a, b)
    with torch.inference_mode():
        assert torch.equal(trained(outside, image, weight, backend)[0], first[0])


def test_raw_maps_made_in_inference_mode_are_read_anew_each_time():
    right = grid()
    x, weight = torch.randn(5, 4, 2, 2), torch.randn(4, 4, 3, 3)
    conv = torch.ops.patchsparse.conv2d
    expected = conv(x, weight, None, right.slot, right.coords, *STENCIL[1:], 1, "gather")
    with torch.inference_mode():
        slot, coords = right.slot.clone(), right.coords.clone()
        assert torch.equal(conv(x, weight, None, slot, coords, *STENCIL[1:], 1, "gather"), expected)
        slot.fill_(-1)  # no version tells
        with pytest.raises(ValueError, match="not the maps of a grid"):
            conv(x, weight, None, slot, coords, *STENCIL[1:], 1, "gather")


def test_the_encoder_of_the_readme_runs_in_inference_mode_and_trains_on():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = sparsify(timm.create_model("resnet18", in_chans=3, features_only=True)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        made = PatchGrid.random(batch=2, shape=(2, 2), keep=2)
        with bind(encoder, made):
            features = encoder(pack(images, made))
        whole = [unpack(f, made) for f in features]
    with bind(encoder, made):
        again = encoder(pack(images, made))
        sum(f.square().mean() for f in again).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for seen, inferred in zip([unpack(f, made) for f in again], whole, strict=True):
        torch.testing.assert_close(seen, inferred)
    assert all(p.grad is not None for p in encoder.parameters())
