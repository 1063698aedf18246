"""The peers of the benchmarks: the same problem in their layouts, the sentences of those that are absent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.measure.scales import scale_of
from benchmarks.peers import (
    Dense,
    DenseAndMask,
    Minkowski,
    Ocnn,
    Packed,
    Peer,
    Spconv,
    SpconvTriton,
    WarpConvNet,
    base,
    check,
    passes,
    peers,
)
from benchmarks.peers.minkowski_resnet import ResNets
from benchmarks.peers.sites import image_offsets, neighbours, pixel_rows, rows_at, sites
from benchmarks.subjects.convolutions import Problem, Shape, problem, reference
from patchsparse import PatchGrid, pack
from patchsparse.backends import tables
from patchsparse.backends.minkowski import loading as minkowski_loading
from patchsparse.geometry import Stencil

from . import imitations

PLAIN = (Shape(4, 5, 7), Shape(1, 6, 4), Shape(2, 3, 5, k=5))
STRIDED = Shape(4, 5, 7, stride=2)
DEPTHWISE = Shape(2, 8, 8, k=7, groups=8)
UNEQUAL = torch.tensor([[[True, False, True], [False, True, True]], [[False] * 3, [False, True, False]]])


def small(shape: Shape) -> Problem:
    return problem(shape, 0.5, 3, torch.float32, "cpu", (2, 3))


@pytest.mark.parametrize("shape", [*PLAIN, STRIDED, DEPTHWISE], ids=str)
@pytest.mark.parametrize("peer", [Dense(), DenseAndMask(), Packed("gather", "cpu")], ids=lambda p: p.name)
def test_whole_images_and_our_engine_agree_with_dense_and_mask(peer: Peer, shape: Shape) -> None:
    assert peer.why_not(shape) is None
    p = small(shape)
    layer = peer.build(p)
    assert max(check(layer, p, reference(p)).values()) < 1e-5
    runs = passes(layer, p, peer.parts)
    assert set(runs) == {"fwd", "dgrad", "wgrad", "bwd", "step", "fwd + map", "step + map"}
    y, gx, gw = (t.detach() for t in runs["step + map"]())
    torch.testing.assert_close(runs["fwd"]()[0].detach(), y)
    for got, expected in (("dgrad", [gx]), ("wgrad", [gw]), ("bwd", [gx, gw])):
        for _ in range(2):  # a pass may be run again and again
            torch.testing.assert_close(runs[got](), expected)


@pytest.mark.parametrize(
    ("peer", "shape"),
    [
        *((peer, shape) for peer in (Ocnn(), Spconv(), SpconvTriton(), WarpConvNet()) for shape in PLAIN),
        (Spconv(), STRIDED),
        (SpconvTriton(), STRIDED),
        (WarpConvNet(), STRIDED),
        (WarpConvNet(), DEPTHWISE),
    ],
    ids=lambda value: value.name if isinstance(value, Peer) else str(value),
)
def test_libraries_are_given_the_same_problem(monkeypatch: pytest.MonkeyPatch, peer: Peer, shape: Shape) -> None:
    """Against stand-ins that follow each library's conventions: coordinates, tables, order of taps and of rows."""
    maps = imitations.install(monkeypatch, peer.name)
    p = small(shape)
    layer = peer.build(p)
    assert max(check(layer, p, reference(p)).values()) < 1e-5
    runs = passes(layer, p, peer.parts)
    assert ("dgrad" in runs) == peer.parts
    assert ("fwd" in runs) == layer.reuses_map
    if layer.reuses_map:
        before = maps.built
        for kind in ("fwd", "step", "bwd"):
            runs[kind]()
        assert maps.built == before, "a pass without its map built one"
    if peer.name != "ocnn":  # whose table is built by the adapter
        before = maps.built
        runs["fwd + map"]()
        assert maps.built > before, "a pass with its map built none"


def test_missing_libraries_give_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda _: None)
    monkeypatch.setattr(minkowski_loading, "find_spec", lambda _: None)
    minkowski_loading.library.cache_clear()
    reasons = {peer.name: peer.why_not() for peer in peers()}
    minkowski_loading.library.cache_clear()
    assert str(reasons.pop("minkowski")).startswith("MinkowskiEngine is not installed; `python scripts/install_mink")
    assert reasons.pop("dense") is None
    assert reasons.pop("dense-and-mask") is None
    assert set(reasons) == {"ocnn", "spconv", "spconv-triton", "warpconvnet"}
    for name, reason in reasons.items():
        assert reason is not None
        assert reason.startswith(f"{name.replace('-', '_')} is not installed; pip install")
        assert "\n" not in reason


def test_a_library_that_breaks_on_import_gives_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"lib of {name} not found")

    imitations.install(monkeypatch, "spconv")
    monkeypatch.setattr(base, "import_module", broken)
    assert str(Spconv().why_not()).startswith(
        "spconv.pytorch cannot be imported (OSError: lib of spconv.pytorch not found); pip install"
    )


@pytest.mark.parametrize(
    ("peer", "shape", "reason"),
    [
        (Ocnn(), STRIDED, "stride 1 only"),
        (Ocnn(), DEPTHWISE, "no Triton kernel for grouped"),
        (Spconv(), DEPTHWISE, "no grouped or depthwise"),
        (SpconvTriton(), DEPTHWISE, "spconv-triton has no grouped or depthwise"),
        (WarpConvNet(), Shape(2, 8, 8, groups=2), "plain and depthwise convolution only"),
    ],
)
def test_what_a_library_cannot_do_is_said(peer: Peer, shape: Shape, reason: str) -> None:
    assert reason in str(peer.why_not(shape))


def test_labels_name_the_type() -> None:
    assert Spconv().dtypes[0] == torch.float16
    assert Spconv().label(torch.float16) == "spconv fp16"
    assert SpconvTriton().label(torch.float16) == "spconv-triton fp16"
    assert WarpConvNet().label(torch.bfloat16) == "warpconvnet bf16"
    assert "float16" in Spconv().note
    assert "no tuned list for H100 and H200" in Ocnn().note


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("k", [3, 7])
def test_table_of_neighbours_equals_the_slot_map(p: int, k: int) -> None:
    grid = PatchGrid.from_active(UNEQUAL)
    expected = tables.tap_rows(grid.slot, grid.coords, (p, p), Stencil((k, k), (1, 1), (k // 2, k // 2)))
    assert torch.equal(neighbours(grid, p, k), expected.clamp_min(-1).to(torch.int32))


def test_coordinates_are_those_of_the_packed_rows() -> None:
    grid = PatchGrid.from_active(UNEQUAL)
    height, width = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    image = torch.stack((torch.zeros(4, 6, dtype=torch.long), height, width)).expand(2, 3, 4, 6).clone()
    image[1, 0] = 1
    expected = pack(image, grid).permute(0, 2, 3, 1).reshape(-1, 3)
    where = sites(grid, 2)
    assert where.dtype == torch.int32
    assert torch.equal(where, expected.to(torch.int32))
    assert torch.equal(rows_at(grid, 2, where), torch.arange(len(where), dtype=torch.int32))
    assert image_offsets(grid, 2).tolist() == [0, 16, 20]
    table = pixel_rows(grid, 2)
    assert torch.equal(table >= 0, grid.pixels((4, 6)))
    assert rows_at(grid, 2, torch.tensor([[1, 0, 0]])).tolist() == [-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the libraries compute on a GPU only")
@pytest.mark.parametrize("peer", [Ocnn(), Spconv(), SpconvTriton(), WarpConvNet()], ids=lambda p: p.name)
def test_installed_libraries_agree_with_dense_and_mask(peer: Peer) -> None:
    if reason := peer.why_not():
        pytest.skip(reason)
    p = problem(Shape(4, 32, 64), 0.6, 4, torch.float32).to(peer.dtypes[0])
    assert max(check(peer.build(p), p, reference(p)).values()) < 2e-2


@pytest.mark.skipif(Minkowski().why_not() is not None, reason=str(Minkowski().why_not()))
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # it makes one per module
@pytest.mark.parametrize(
    "shape", [*PLAIN, Shape(4, 5, 7, k=1), Shape(4, 5, 7, k=1, stride=2), STRIDED, DEPTHWISE], ids=str
)
def test_minkowski_agrees_on_the_cpu(shape: Shape) -> None:
    p = small(shape)
    layer = Minkowski().build(p)
    assert max(check(layer, p, reference(p)).values()) < 1e-5
    runs = passes(layer, p, Minkowski.parts)
    y, gx, gw = (t.detach() for t in runs["step + map"]())
    torch.testing.assert_close(runs["fwd"]()[0].detach(), y)
    for _ in range(2):
        torch.testing.assert_close(runs["bwd"](), [gx, gw])


@pytest.mark.skipif(Minkowski().why_not() is not None, reason=str(Minkowski().why_not()))
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_resnet_of_minkowski_is_that_of_dense_and_mask() -> None:
    """The same check as opens the gate of the benchmark, on small images."""
    ways = ResNets(replace(scale_of("tiny", torch.device("cpu")), layer_batch=2))
    ways.check()
    for step in ways.steps().values():
        step()
