"""One dispatcher for every operator: names, reasons, the environment variable, and what runs is what `explain` says."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchsparse
from patchsparse import PatchGrid, explain, patch_batch_norm_act, patch_conv2d, sparsify, why_unavailable
from patchsparse.backends import BODIES, ENGINES, OPERATIONS, OVERRIDE, choose, engine
from patchsparse.backends.cpp import choice, library
from patchsparse.backends.minkowski import loading
from patchsparse.eager import forget
from patchsparse.explanation import OPERATORS
from patchsparse.geometry import Call, Stencil

GRID = PatchGrid.random(2, (3, 3), keep=4, generator=torch.Generator().manual_seed(0))
# Small valid arguments of every operator, and the operation that it asks for.
CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {}


def _case(label: str, operation: str, *arguments: Any, **options: Any) -> None:
    CASES[label] = (operation, arguments, options)


def _fill() -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1))

    packed, image, square = random(8, 32, 4, 4), random(2, 32, 6, 6), random(32, 32, 3, 3)
    last, halving = packed.permute(0, 2, 3, 1), Stencil((2, 2), (2, 2))
    _case("patch_conv2d", "conv2d", packed, square, None, GRID, padding=1)
    _case("patch_conv2d 1x1", "product", packed, random(32, 32, 1, 1), None, GRID)
    _case("patch_conv2d 1x1 in groups", "local_conv2d", packed, random(32, 8, 1, 1), None, GRID, groups=4)
    _case("patch_conv_transpose2d", "conv2d_dgrad", packed, random(32, 32, 4, 4), None, GRID, stride=2, padding=1)
    _case("patch_max_pool2d", "max_pool2d", packed, GRID, 3, 2, 1)
    _case("patch_max_pool2d local", "local_max_pool2d", packed, GRID, 2)
    _case("patch_avg_pool2d", "avg_pool2d", packed, GRID, 3, 2, 1)
    _case("patch_avg_pool2d local", "local_avg_pool2d", packed, GRID, 2)
    _case("patch_batch_norm_act", "batch_norm_act", packed, random(32), random(32), None, None)
    _case("patch_batch_norm_unpack", "batch_norm_unpack", packed, GRID, random(32), random(32), None, None)
    _case("local_conv2d", "product", packed, random(32, 32, 2, 2), None, halving, 1)
    _case("local_linear", "product", last, random(8, 32), None)
    _case("image_conv2d", "image_conv2d", image, square)
    _case("image_conv2d 1x1", "image_conv2d", image, random(32, 32, 1, 1))
    _case("image_conv_transpose2d", "image_conv_transpose2d", image, random(32, 32, 4, 4))
    _case("image_engine", "image_conv2d", image, 32)
    _case("image_grid", "image_grid", image)


_fill()
every_operator = pytest.mark.parametrize("label", CASES)
built = pytest.mark.skipif(library.load().problem is not None, reason=str(library.load().problem))


def call(label: str, **more: Any) -> Any:
    """Call the operator of a case."""
    _, arguments, options = CASES[label]
    return OPERATORS[label.split()[0]][0](*arguments, **options, **more)


def told(label: str, **more: Any) -> str:
    """Return what `explain` says of a case."""
    _, arguments, options = CASES[label]
    return explain(OPERATORS[label.split()[0]][0], *arguments, **options, **more)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the engines' bodies as they are called, such as ``"gather.conv2d"``."""
    called: list[str] = []
    for name in ("cpp", "gather", "minkowski", "dense"):
        for operation in (*OPERATIONS, "linear"):
            original = getattr(engine(name), operation, None)
            if original is not None:

                def spy(*args: Any, original=original, what=f"{name}.{operation}") -> Any:
                    called.append(what)
                    return original(*args)

                monkeypatch.setattr(engine(name), operation, spy)
    return called


def test_every_public_operator_is_in_the_table():
    takes = {n for n in patchsparse.__all__ if "backend" in inspect.signature(getattr(patchsparse, n)).parameters}
    others = {"sparsify", "why_unavailable"}  # they take a name, and compute nothing with it
    assert takes - others <= set(OPERATORS)
    assert {label.split()[0] for label in CASES} == set(OPERATORS)
    for refuse in (lambda: sparsify(nn.Conv2d(1, 1, 3), backend="cuda"), lambda: why_unavailable("cuda")):
        with pytest.raises(ValueError, match=r"backend 'cuda' is unknown; choose one of"):
            refuse()


def test_the_table_of_bodies_is_what_the_engines_have():
    replaced = {"product", "image_conv2d", "image_conv_transpose2d", "image_grid"}  # by its convolutions
    for name in ENGINES:
        if name == "triton" and why_unavailable("triton") is not None and "imported" in str(why_unavailable("triton")):
            continue
        own = set(BODIES[name]) - (replaced if name == "cpp" else {"image_grid"})
        assert own == {operation for operation in OPERATIONS if hasattr(engine(name), operation)}, name
    assert set(BODIES["gather"]) == set(OPERATIONS)


@every_operator
def test_an_unknown_backend_is_refused_by_name(label, monkeypatch):
    sentence = r"backend 'no-such-engine' is unknown; choose one of auto, triton, cpp, gather, minkowski, dense"
    for ask in (call, told):
        with pytest.raises(ValueError, match=sentence):
            ask(label, backend="no-such-engine")
    monkeypatch.setenv(OVERRIDE, "no-such-engine")
    for ask in (call, told):
        with pytest.raises(ValueError, match=sentence):
            ask(label)


@every_operator
@pytest.mark.parametrize("backend", ["triton", "minkowski", "cpp"])
def test_an_engine_that_cannot_run_here_says_why(label, backend, monkeypatch):
    """Whether or not it has a body for the operator."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton runs here")
    reason = {"triton": "CUDA|imported", "minkowski": "it is away", "cpp": "was not built"}[backend]
    monkeypatch.setattr(loading, "library", lambda: loading.Library(None, None, "it is away"))
    monkeypatch.setattr(library, "load", lambda: library.Library(None, "the C++ engine was not built"))
    for ask in (call, told):
        with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot run \w+: .*({reason})"):
            ask(label, backend=backend)
    monkeypatch.setenv(OVERRIDE, backend)
    with pytest.raises(RuntimeError, match=reason):
        call(label)


@every_operator
def test_the_environment_variable_is_seen(label, bodies, monkeypatch):
    monkeypatch.setenv(OVERRIDE, "gather")
    text = told(label)
    assert "gather: taken, " in text
    result = call(label)
    if label == "image_engine":
        assert result is False
    elif label == "image_grid":
        assert result is None
    else:
        assert bodies
    assert all(name.startswith("gather.") for name in bodies)


@every_operator
@pytest.mark.parametrize("backend", ["auto", "cpp", "gather", "dense", "minkowski"])
@pytest.mark.parametrize("slow", [False, True])
def test_what_explain_names_is_what_runs(label, backend, slow, bodies, monkeypatch):
    """With PyTorch's products slow and fast: where they are slow, the C++ engine multiplies."""
    monkeypatch.setattr(choice, "products_are_slow", lambda: slow)
    if (reason := None if backend == "auto" else why_unavailable(backend)) is not None:
        pytest.skip(reason)
    text = told(label, backend=backend)
    assert not bodies, "explain computes nothing"
    [taken] = [line.split(":")[0].strip() for line in text.splitlines() if ": taken, " in line]
    operation = CASES[label][0]
    result = call(label, backend=backend)
    if label == "image_engine":
        assert result is (taken == "cpp")
    elif label == "image_grid":
        assert (result is not None) is (taken == "cpp")
    else:
        assert bodies
        assert {name.split(".")[0] for name in bodies} == {taken}
        asked = text.split()[0]
        assert asked == operation or (label == "image_conv2d 1x1" and asked == "product")
        if taken == "gather":
            assert bodies == ["gather.linear" if label == "local_linear" else f"gather.{asked}"]
    if backend not in ("auto", taken):
        assert taken == "gather"
        assert f"{backend}: " in text
        assert "gather, the readable definition, serves" in text


@pytest.mark.parametrize(
    ("label", "backend"),
    [
        (label, name)
        for label in CASES
        for name in ("triton", "minkowski", "dense")
        if CASES[label][0] not in BODIES[name]
    ],
)
def test_a_usable_engine_without_a_body_leaves_the_operator_to_gather(label, backend, bodies, monkeypatch):
    """As where an encoder convolves by MinkowskiEngine and its norms have no body there."""
    operation = CASES[label][0]
    if backend == "triton" and "imported" in str(why_unavailable("triton")):
        pytest.skip(str(why_unavailable("triton")))
    monkeypatch.setattr(engine(backend), "why_unusable", lambda device, dtype: None)
    text = told(label, backend=backend)
    assert f"{backend}: has no {operation} of its own: gather, the readable definition, serves" in text
    assert "gather: taken, " in text
    monkeypatch.setenv(OVERRIDE, backend)
    for more in ({"backend": backend}, {}):
        call(label, **more)
    assert all(name.startswith("gather.") for name in bodies)
    assert len(bodies) == (0 if label in ("image_engine", "image_grid") else 2)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_on_a_gpu_auto_takes_triton_where_it_has_a_body_and_runs(operation, monkeypatch):
    if "imported" in str(why_unavailable("triton")):
        pytest.skip(str(why_unavailable("triton")))
    on_a_gpu = Call(operation, "cuda", torch.float32, 8, (4, 4), 32, 32, Stencil((3, 3), (1, 1), (1, 1)))
    monkeypatch.setattr(engine("triton"), "why_unusable", lambda device, dtype: "too old a device")
    assert choose(on_a_gpu, "auto") == "gather"
    monkeypatch.setattr(engine("triton"), "why_unusable", lambda device, dtype: None)
    forget()
    assert choose(on_a_gpu, "auto") == ("triton" if operation in BODIES["triton"] else "gather")
    large = on_a_gpu._replace(num_active=2**31)
    assert choose(large, "auto") == "gather"


def test_an_operator_without_a_body_is_said_to_run_in_gather(bodies):
    text = told("patch_avg_pool2d", backend="dense")
    assert "dense: has no avg_pool2d of its own: gather, the readable definition, serves" in text
    assert "gather: taken, " in text
    assert torch.equal(call("patch_avg_pool2d", backend="dense"), call("patch_avg_pool2d", backend="gather"))
    assert bodies == ["gather.avg_pool2d"] * 2


@built
def test_cpp_leaves_norms_to_gather_and_back(bodies):
    packed = torch.randn(8, 32, 4, 4, requires_grad=True)
    text = explain("patch_batch_norm_act", packed, None, None, None, None, backend="cpp")
    assert "cpp: has no batch_norm_act of its own: gather, the readable definition, serves" in text
    assert "batch_norm_act_grad, in the backward pass: gather" in text
    patch_batch_norm_act(packed, None, None, None, None, backend="cpp").sum().backward()
    assert bodies == ["gather.batch_norm_act", "gather.batch_norm_act_grad"]


@pytest.mark.parametrize("backend", ["auto", "gather", "dense"])
def test_the_backward_pass_is_that_which_explain_names(backend, bodies):
    packed, weight = torch.randn(8, 8, 4, 4, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    arguments = (packed, weight, None, GRID, 1, 1, 1, 1, backend)
    lines = [line.split() for line in explain(patch_conv2d, *arguments).splitlines() if "in the backward" in line]
    patch_conv2d(*arguments).sum().backward()
    assert [f"{words[-1]}.{words[0].strip(',')}" for words in lines] == bodies[1:]
    assert len(lines) == 2


@every_operator
def test_no_rows_are_no_reason_to_ask_nobody(label, bodies):
    """An empty batch is gather's, and a name is checked all the same."""
    _, arguments, options = CASES[label]
    function = OPERATORS[label.split()[0]][0]
    nothing = PatchGrid.random(2, (3, 3), keep=0)
    changed = [nothing if a is GRID else a[:0] if i == 0 else a for i, a in enumerate(arguments)]
    with pytest.raises(ValueError, match="is unknown"):
        function(*changed, **options, backend="no-such-engine")
    function(*changed, **options)
    assert all(name.startswith("gather.") for name in bodies)


@every_operator
def test_on_the_meta_device_any_engine_will_do(label):
    """Nothing is computed there, so that no engine need run."""
    _, arguments, options = CASES[label]
    grid = GRID.to("meta")
    moved = [grid if a is GRID else a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    function = OPERATORS[label.split()[0]][0]
    results = [function(*moved, **options, backend=name) for name in ("auto", *ENGINES)]
    for result in results:
        assert result in (False, None) if label in ("image_engine", "image_grid") else result.is_meta


@pytest.mark.parametrize("operation", ["conv2d", "max_pool2d", "avg_pool2d", "batch_norm_unpack"])
def test_gradients_of_no_rows_are_zero(operation):
    nothing = PatchGrid.random(2, (3, 3), keep=0)
    packed, weight = torch.zeros(0, 4, 2, 2, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    run = {
        "conv2d": lambda: patch_conv2d(packed, weight, None, nothing, padding=1),
        "max_pool2d": lambda: patchsparse.patch_max_pool2d(packed, nothing, 3, 1, 1),
        "avg_pool2d": lambda: patchsparse.patch_avg_pool2d(packed, nothing, 3, 1, 1, count_include_pad=False),
        "batch_norm_unpack": lambda: patchsparse.patch_batch_norm_unpack(packed, nothing, None, None, None, None),
    }[operation]
    run().sum().backward()
    assert packed.grad is not None
    assert packed.grad.shape == (0, 4, 2, 2)
    if operation == "conv2d":
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", ["auto", "cpp", "dense"])
def test_operators_that_choose_outside_a_registered_one_compile_to_one_graph(backend):
    if backend == "cpp" and library.load().problem is not None:
        pytest.skip(str(library.load().problem))
    packed, weight, image = torch.randn(8, 32, 4, 4), torch.randn(32, 32, 1, 1), torch.randn(2, 32, 6, 6)

    def network(packed: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = patch_conv2d(packed, weight, None, GRID, backend=backend)
        y = patchsparse.patch_max_pool2d(y, GRID, 2, backend=backend)
        y = patchsparse.patch_avg_pool2d(y, GRID, 2, backend=backend)
        z = patchsparse.image_conv2d(image, weight, None, backend)
        assert patchsparse.image_grid(z, backend) is None, "a graph is left to PyTorch"
        return y, patchsparse.image_conv_transpose2d(z, weight.expand(32, 32, 4, 4), None, backend)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    y = F.avg_pool2d(F.max_pool2d(F.conv2d(packed, weight), 2), 2)
    z = F.conv_transpose2d(F.conv2d(image, weight), weight.expand(32, 32, 4, 4), None, 2, 1)
    for ours, theirs in zip(compiled(packed, image), (y, z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_explain_refuses_what_is_no_operator():
    with pytest.raises(ValueError, match="pack is not an operator that an engine computes; choose one of patch_conv2d"):
        explain(patchsparse.pack, torch.zeros(2, 4, 6, 6), GRID)
    with pytest.raises(TypeError, match="missing a required argument: 'grid'"):
        explain("patch_conv2d", torch.zeros(8, 4, 2, 2), torch.zeros(4, 4, 3, 3), None)
    with pytest.raises(ValueError, match="does not map patches to patches"):
        explain("patch_conv2d", torch.zeros(8, 4, 2, 2), torch.zeros(4, 4, 3, 3), None, GRID)
