"""The Triton kernels in Triton's interpreter, on CPU tensors, against the ``gather`` engine and PyTorch.

``test_triton.py`` runs this file in a process of its own with ``TRITON_INTERPRET=1``, which must be set before the
kernels are defined. Uninitialised memory is filled with NaN, so a value that is never written shows.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchsparse import (
    PatchGrid,
    pack,
    patch_batch_norm_act,
    patch_batch_norm_unpack,
    patch_conv2d,
    patch_conv_transpose2d,
    patch_max_pool2d,
)
from patchsparse.backends.triton import tuning
from patchsparse.functional.norm import ACTIVATIONS
from patchsparse.geometry import Stencil

from ..matrix import one_of_each, rest_but
from .cases import Case, cases
from .public_calls import CALLS, inputs_of

FEW = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(autouse=True)
def _poison():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def results(backend: str, inputs: tuple[Tensor, ...], run, seed: int) -> list[Tensor]:
    """Return the output of ``run(backend, *inputs)`` and the gradients at the inputs, for a random direction."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    output = run(backend, *leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, leaves, direction.to(output))]


def check(inputs: tuple[Tensor, ...], run, seed: int) -> None:
    """Check that Triton errs at most twice as much as PyTorch in the same dtype, both against float64."""
    exact = results("gather", tuple(i.double() for i in inputs), run, seed)
    plain = results("gather", inputs, run, seed)
    for e, p, t in zip(exact, plain, results("triton", inputs, run, seed), strict=True):
        assert t.dtype == p.dtype
        assert t.shape == p.shape
        scale = e.abs().amax().item() if e.numel() else 0.0
        allowed = 2 * (p - e).abs().amax().item() if e.numel() else 0.0
        got = (t - e).abs().amax().item() if e.numel() else 0.0
        assert got <= allowed + 4 * torch.finfo(t.dtype).eps * scale + 1e-30


def operands(case: Case, out: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    channels = case.image.shape[1]
    weight = case.normal(out, channels // groups, *case.kernel)
    return pack(case.image, case.grid).to(dtype), weight.to(dtype), case.normal(out).to(dtype)


@pytest.mark.rest
@given(
    case=cases(kernels=(1, 2, 3, 5), channels=(1, 33, 40), patches=(1, 2, 3, 4), dtype=torch.float32),
    out=st.sampled_from([1, 8, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@FEW
def test_convolution(case, out, dtype):
    stencil = Stencil(case.kernel, **case.stencil)
    if stencil.local:
        return
    inputs = operands(case, out, 1, dtype)
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, case.grid, backend=b, **case.stencil), case.seed)


@pytest.mark.parametrize(("p", "k", "stride"), rest_but([(1, 7, 1)], [(1, 7, 1), (2, 7, 1), (4, 7, 2)]))
def test_large_kernels(p, k, stride):
    grid = PatchGrid.random(1, (3, 4), 0.5, torch.Generator().manual_seed(p))
    inputs = normal(p, (grid.num_active, 16, p, p), (8, 16, k, k), (8,))
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, grid, stride, k // 2, backend=b), 1)


def test_two_output_channels_a_group():
    grid = PatchGrid.random(2, (2, 3), 0.5, torch.Generator().manual_seed(0))
    inputs = normal(0, (grid.num_active, 3, 2, 2), (6, 1, 3, 3), (6,))
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, grid, 1, 1, groups=3, backend=b), 8)


@pytest.mark.parametrize(
    ("k", "stride", "padding", "output_padding"), rest_but([(3, 2, 1, 1)], [(4, 2, 1, 0), (3, 2, 1, 1), (3, 1, 1, 0)])
)
def test_transposed_convolution(k, stride, padding, output_padding):
    grid = PatchGrid.random(2, (3, 3), 0.5, torch.Generator().manual_seed(k))
    inputs = normal(k, (grid.num_active, 18, 2, 3), (18, 33, k, k), (33,))
    options = (stride, padding, output_padding)
    check(inputs, lambda b, x, w, c: patch_conv_transpose2d(x, w, c, grid, *options, backend=b), 2)


def normal(seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


@pytest.mark.parametrize("case", [(0, 0), (1, 0), (1, 1), (12, 1)])
def test_no_patch_one_patch_all_patches(case):
    visible, batch = case
    grid = PatchGrid.random(batch, (3, 4), visible, torch.Generator().manual_seed(0))
    inputs = normal(0, (grid.num_active, 33, 2, 2), (6, 33, 3, 3), (6,))
    check(inputs, lambda b, x, w, c: patch_conv2d(x, w, c, grid, 1, 1, backend=b), 0)


@given(
    case=cases(kernels=(2, 3, 5), dilations=(1, 2), channels=(1, 3, 17), patches=(1, 2, 3, 4), dtype=torch.float32),
    ceil=st.booleans(),
    low=st.booleans(),
)
@FEW
def test_max_pooling_and_its_ties(case, ceil, low):
    size = tuple(s // g for s, g in zip(case.image.shape[2:], case.grid.shape, strict=True))
    stencil = Stencil(case.kernel, **case.stencil)
    try:
        stencil.check(size, "test", ceil)
    except ValueError:
        return
    if stencil.local:
        return
    x = pack(case.image, case.grid).round()  # whole numbers: many ties
    x = (x - 5 if low else x).requires_grad_()
    got, expected = (
        patch_max_pool2d(x, case.grid, case.kernel, ceil_mode=ceil, backend=b, **case.stencil)
        for b in ("triton", "gather")
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    direction = case.normal(*got.shape)
    grads = [torch.autograd.grad(y, x, direction)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_max_pooling_keeps_nan():
    grid = PatchGrid.random(1, (3, 3), 0.6, torch.Generator().manual_seed(0))
    (x,) = normal(0, (grid.num_active, 3, 4, 4))
    x[1, :, 2] = torch.nan
    got, expected = (patch_max_pool2d(x, grid, 3, 2, 1, backend=b) for b in ("triton", "gather"))
    assert got.isnan().any()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_tuning_remembers_the_fastest_of_the_configurations_that_agree():
    tuner_key = ("a kind of call of this test",)
    good = torch.ones(4)

    def run(config: str) -> Tensor:
        if config == "slow":
            torch.linalg.svd(torch.ones(200, 200))
        return {"wrong": good * 1.1, "nan": good * torch.nan}.get(config, good)

    with tuning.tune(repetitions=3) as tuner:
        tuning.best(tuner_key, ("slow", "wrong", "nan", "fast"), run)
    assert tuner.best(tuner_key) == "fast"
    by_name = {m.config: m for m in tuner.found[tuner_key]}
    assert by_name["wrong"].seconds == by_name["nan"].seconds == float("inf")
    assert by_name["wrong"].error == pytest.approx(0.1, rel=1e-3)
    assert tuner.seconds > 0
    asked: list[str] = []
    tuning.best(tuner_key, ("slow",), lambda config: asked.append(config) or good)
    assert asked == ["fast"]  # also outside of tune()


@pytest.mark.parametrize(
    ("activation", "rows_and_mode"), one_of_each(ACTIVATIONS, [(70, 9, True), (3, 300, True), (16, 20, False)])
)
def test_batch_norm_act(activation, rows_and_mode):
    channels, rows, training = rows_and_mode
    x, residual, weight, bias = normal(rows, (rows, channels, 2, 2), (rows, channels, 2, 2), (channels,), (channels,))
    x = x * 3 + 10
    state = {b: (torch.zeros(channels), torch.ones(channels)) for b in ("triton", "gather")}

    def run(backend: str, x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        mean, var = (s.to(x.dtype).clone() for s in state[backend])
        options = {"activation": activation, "residual": r, "backend": backend}
        y = patch_batch_norm_act(x, w, b, mean, var, training, **options)
        if x.dtype == torch.float32:
            state[backend + " after"] = (mean, var)
        return y

    check((x, weight, bias, residual), run, 4)
    for got, expected in zip(state["triton after"], state["gather after"], strict=True):
        torch.testing.assert_close(got, expected)


def test_batch_norm_act_in_bfloat16_without_affine_or_residual():
    (x,) = normal(0, (40, 24, 2, 2))
    options = (None, None, None, None, True)
    check((x.bfloat16(),), lambda b, x: patch_batch_norm_act(x, *options, activation="relu", backend=b), 5)


@pytest.mark.parametrize(
    ("dtype", "patches"),
    one_of_each(
        [torch.float32, torch.bfloat16, torch.float16], [(70, (2, 3), True), (3, (5, 4), True), (16, (1, 1), False)]
    ),
)
def test_norm_and_unpack(dtype, patches):
    """Unequal counts, one image without any; the interpreter's poison shows pixels that are never written."""
    channels, size, training = patches
    active = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    active[1] = False
    grid = PatchGrid.from_active(active)
    x, *rest = normal(channels, (grid.num_active, channels, *size), (channels,), (channels,), (channels,))
    state: dict[str, list[Tensor]] = {}

    def run(backend: str, x: Tensor, w: Tensor, b: Tensor, token: Tensor) -> Tensor:
        mean, var = (torch.full((channels,), value, dtype=w.dtype) for value in (0.5, 2.0))
        y = patch_batch_norm_unpack(x, grid, w, b, mean, var, token, training, backend=backend)
        if x.dtype == dtype:
            state[backend] = [mean, var]
        return y

    check(((x * 3 + 2).to(dtype), *rest), run, channels)
    for got, expected in zip(state["triton"], state["gather"], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("visible", [0, 1, 12])
def test_norm_and_unpack_of_no_patch_one_patch_all_patches(visible):
    grid = PatchGrid.random(2, (3, 4), visible, torch.Generator().manual_seed(0))
    x, token = normal(0, (grid.num_active, 5, 2, 2), (5,))
    check((x, token), lambda b, x, t: patch_batch_norm_unpack(x, grid, None, None, None, None, t, backend=b), 6)
    check((x,), lambda b, x: patch_batch_norm_unpack(x, grid, None, None, None, None, backend=b), 7)


@pytest.mark.rest
def test_gradients_of_norm_and_unpack_are_deterministic_and_rows_permute():
    grid = PatchGrid.random(3, (4, 4), 0.4, torch.Generator().manual_seed(0))
    x, token = normal(1, (grid.num_active, 24, 4, 4), (24,))
    order = torch.randperm(grid.num_active, generator=torch.Generator().manual_seed(0))

    def gradients(x: Tensor, grid: PatchGrid) -> list[Tensor]:
        options = (grid, None, None, None, None)
        return results("triton", (x, token), lambda b, x, t: patch_batch_norm_unpack(x, *options, t, backend=b), 0)

    first, again, permuted = gradients(x, grid), gradients(x, grid), gradients(x[order], grid.permute(order))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(permuted[0], first[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted[1], first[1][order], rtol=1e-5, atol=1e-5)


def test_batch_norm_variance_of_far_off_values():
    x = normal(0, (500, 4, 2, 2))[0] + 1000
    got = patch_batch_norm_act(x, None, None, None, None, True, backend="triton")
    exact = F.batch_norm(x.double(), None, None, training=True)
    plain = F.batch_norm(x, None, None, training=True)
    assert (got - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + 1e-4


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(("pack", "unpack", "image"))])
def test_in_place_is_as_out_of_place(name):
    call, found = CALLS[name], []
    for inplace in (False, True):
        inputs = inputs_of(call, torch.float32)
        changed = F.silu(call.run("triton", *inputs), inplace)
        direction = torch.linspace(-1, 2, changed.numel()).view(changed.shape)
        found.append([changed, *torch.autograd.grad(changed, inputs, direction)])
    assert all(torch.equal(apart, within) for apart, within in zip(*found, strict=True))
