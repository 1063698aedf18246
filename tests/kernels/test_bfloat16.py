"""bfloat16 in the C++ engine on every instruction set: exactness, edges of channels and rows, the choice of a way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchsparse import PatchGrid, pack
from patchsparse.backends import cpp
from patchsparse.backends.cpp import library, native
from patchsparse.geometry import Call, Stencil
from patchsparse.ops import conv as ops

from .cases import cases
from .test_conv import gradients, masked_conv, relative_error

ISAS = library.load().isas
WIDENING = [isa for isa in ISAS if native.ISAS.index(isa) < native.BF16]  # they multiply float32
pytestmark = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def results(
    grid: PatchGrid, operands: tuple[Tensor, ...], stencil: dict, exact: torch.dtype | None = None
) -> list[Tensor]:
    """Return output and gradients of a convolution of packed patches, by the engine or by PyTorch in ``exact``."""
    leaves = tuple(t.to(exact or t.dtype).detach().requires_grad_() for t in operands)
    if exact is None:
        options = (*(list(stencil[name]) for name in ("stride", "padding", "dilation")), 1, "cpp")
        output = ops.conv2d(pack(leaves[0], grid), *leaves[1:], grid.slot, grid.coords, *options)
    else:
        output = masked_conv(leaves[0], grid.active, *leaves[1:], **stencil)
    return [output, *gradients(output, leaves, 9)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride"),
    [
        (8, (64, 96), 3, 1),
        (4, (161, 130), 3, 1),
        (2, (288, 64), 3, 1),
        (1, (256, 320), 3, 1),
        (1, (33, 992), 3, 1),
        (8, (34, 75), 3, 2),
        (2, (129, 257), 3, 2),
        (4, (300, 33), 1, 1),
        (2, (64, 128), 1, 2),
    ],
)
def test_it_is_as_exact_as_pytorch(isa, size, channels, kernel, stride, monkeypatch):
    """error(ours) <= 2 x error(PyTorch), both against float64; several panels, bands, blocks of rows and chunks."""
    monkeypatch.setenv(library.ISA, isa)
    batch = 20 if size == 1 else 6
    grid = PatchGrid.random(batch, (7, 8), keep=0.7, generator=torch.Generator().manual_seed(size))
    operands = (
        normal(batch, channels[0], 7 * size, 8 * size),
        normal(channels[1], channels[0], kernel, kernel, seed=1).contiguous(memory_format=torch.channels_last),
        normal(channels[1], seed=2),
    )
    stencil = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), "dilation": (1, 1)}
    exact, theirs = (results(grid, operands, stencil, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, e, p, o in zip("yxwb", exact, theirs, results(grid, operands, stencil), strict=True):
        assert o.dtype == torch.bfloat16
        assert relative_error(o, e) <= 2 * relative_error(p, e), name


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(
    case=cases(
        kernels=(1, 3), dilations=(1,), channels=(1, 2, 15, 31, 33, 63, 65), patches=(1, 2, 4, 6), dtype=torch.float32
    ),
    out=st.sampled_from([1, 2, 16, 17, 32, 33, 49]),
)
def test_small_integers_are_multiplied_exactly(isa, case, out):
    """Sums of small integers are exact, so that a pair left out or taken twice shows, whatever the tail of channels."""
    operands = tuple(
        (t * 2).round().clamp(-2, 2).bfloat16()
        for t in (case.image, case.normal(out, case.image.shape[1], *case.kernel), case.normal(out))
    )
    exact = results(case.grid, operands, case.stencil, torch.float64)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA, isa)
        output = results(case.grid, operands, case.stencil)[0]
    assert torch.equal(output, exact.bfloat16())


def layouts(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the same weights in each order that is packed in its own way, and in one that has none."""
    return (
        weight.contiguous(),
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        torch.cat((weight, weight), 3)[..., 3:],
    )


@pytest.mark.parametrize("isa", WIDENING)
@pytest.mark.parametrize(
    ("size", "stride", "channels"),
    [(4, 1, (37, 50)), (2, 1, (5, 40)), (2, 2, (33, 20)), (1, 1, (50, 67)), (1, 1, (400, 350))],
)
def test_results_are_those_of_widened_operands_rounded_once(isa, size, stride, channels, monkeypatch):
    """Bit for bit, by Winograd's way and directly; the last has several chunks and runs, for each of its taps."""
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(8, (8, 8), keep=64 if size == 1 else 9, generator=torch.Generator().manual_seed(1))
    maps, stencil = (grid.slot, grid.coords), Stencil((3, 3), (stride, stride), (1, 1))
    x, grad = (normal(grid.num_active, c, s, s) for c, s in zip(channels, (size, size // stride), strict=True))
    bias = normal(channels[1])
    for weight in layouts(normal(channels[1], channels[0], 3, 3, seed=2)):
        for run in (
            lambda t, w=weight: cpp.conv2d(t(x), t(w), t(bias), *maps, stencil, 1),
            lambda t, w=weight: cpp.conv2d_dgrad(t(grad), t(w), *maps, (size, size), stencil, 1),
        ):
            assert torch.equal(run(torch.clone), run(Tensor.float).bfloat16())
    half, full = (cpp.conv2d_wgrad(t(x), t(grad), *maps, stencil, 1) for t in (torch.clone, Tensor.float))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 4])
def test_wider_images_read_bfloat16_weights_as_they_are(isa, dtype, size, monkeypatch):
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(2, (4, 4), keep=9, generator=torch.Generator().manual_seed(1))
    x = normal(18, 35, size, size).to(dtype)
    for weight in layouts(normal(41, 35, 3, 3, seed=2)):
        narrow, wide = (
            cpp.conv2d(x, w, None, grid.slot, grid.coords, Stencil((3, 3), (1, 1), (1, 1)), 1)
            for w in (weight, weight.to(dtype))
        )
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "channels"), [(1, 33), (2, 5), (4, 47)])
def test_a_nan_stays_with_the_pixels_that_read_it(isa, size, channels, monkeypatch):
    """A row of an odd number of channels is not paired with the first channel of the next one."""
    monkeypatch.setenv(library.ISA, isa)
    grid = PatchGrid.random(2, (4, 4), keep=9, generator=torch.Generator().manual_seed(1))
    x, grad = normal(18, channels, size, size), normal(18, channels, size, size, seed=1)
    x[3, 0, 0, 0] = grad[4, 0, -1, -1] = torch.nan
    weight, maps = normal(channels, channels, 3, 3, seed=2), (grid.slot, grid.coords)
    three = Stencil((3, 3), (1, 1), (1, 1))
    for run in (
        lambda t: cpp.conv2d(t(x), t(weight), None, *maps, three, 1),
        lambda t: cpp.conv2d_dgrad(t(grad), t(weight), *maps, (size, size), three, 1),
    ):
        monkeypatch.setattr(cpp, "winograd", lambda *_: False)  # its sums spread a NaN over a tile of 2x2 pixels
        assert torch.equal(run(torch.clone).isnan(), run(Tensor.double).isnan())


@pytest.mark.parametrize("isa", ISAS)
def test_the_way_follows_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv(library.ISA, isa)
    direct = native.ISAS.index(isa) >= native.BF16
    three = Stencil((3, 3), (1, 1), (1, 1))
    assert cpp.winograd(torch.bfloat16, (4, 4), (64, 64), three) is not direct
    assert cpp.winograd(torch.float32, (4, 4), (64, 64), three)

    def pays(channels: int, operation: str = "conv2d") -> bool:
        strided = Stencil((3, 3), (2, 2), (1, 1))
        return cpp.pays(Call(operation, "cpu", torch.bfloat16, 8, (8, 8), channels, channels, strided))

    assert pays(64) is pays(64, "conv2d_wgrad") is direct
    assert not pays(8)
    assert not pays(16, "conv2d_wgrad")
