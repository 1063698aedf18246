"""LAMB is timm's LAMB, and clipping is PyTorch's clipping, whatever the layout and the way through memory."""

import copy
import io
from typing import Any

import pytest
import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spatspark_fast.models.spark import build_spark
from spatspark_fast.training import lamb
from spatspark_fast.training.device_rates import to_device
from spatspark_fast.training.lamb import Lamb, clip_gradients
from spatspark_fast.training.optim import build_optimizer, parameter_groups, set_rates
from spatspark_fast.training.options import OptimOptions

BETAS = (0.9, 0.95)


@pytest.fixture
def model() -> nn.Module:
    """Return a small SparK model in channels_last, some of its weights 0."""
    torch.manual_seed(0)
    spark = build_spark("test_resnet", in_chans=2, decoder_width=64)
    with torch.no_grad():
        spark.decoder.head.weight.zero_()
    return spark.to(memory_format=torch.channels_last)


def timm_lamb(model: nn.Module, dtype: torch.dtype = torch.float32) -> TimmLamb:
    return TimmLamb(
        parameter_groups(model.to(dtype).named_parameters()), lr=0.0, betas=BETAS, weight_decay=0.0, max_grad_norm=None
    )


def our_lamb(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model.named_parameters(), OptimOptions(name="lamb", betas=list(BETAS)), 0.0)


def give_gradients(models: list[nn.Module], step: int, skip: int = -1) -> None:
    """Give all models the same gradients, very large and very small ones among them; one parameter gets none."""
    generator = torch.Generator().manual_seed(step)
    for number, twins in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        gradient = torch.randn(twins[0].shape, generator=generator) * 10.0 ** (number % 7 - 4)
        for parameter in twins:
            parameter.grad = None if number == skip else gradient.to(parameter.dtype)


def error(model: nn.Module, truth: nn.Module) -> float:
    """Return the largest error of a parameter, as a share of its largest value."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        for a, b in zip(model.state_dict().values(), truth.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("on_cpu", "chunk"),
    [(True, 1 << 16), (True, 1000), (False, 1 << 16)],
)
def test_steps_are_those_of_timm(model: nn.Module, on_cpu: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamb, "on_cpu", lambda tensor: on_cpu)
    monkeypatch.setattr(lamb, "CHUNK", chunk)
    truth, theirs, ours = copy.deepcopy(model).double(), copy.deepcopy(model), model
    optimizers: list[torch.optim.Optimizer] = [timm_lamb(truth, torch.float64), timm_lamb(theirs), our_lamb(ours)]
    for step in range(20):
        give_gradients([truth, theirs, ours], step, skip=step % 3)
        for optimizer in optimizers:
            set_rates(optimizer.param_groups, 0.01 * (step + 1) / 20, 0.04 + 0.008 * step)
            optimizer.step()
    assert 0 < error(ours, truth) <= 2 * error(theirs, truth) + 1e-7
    assert error(ours, truth) < 1e-5


def test_a_checkpoint_of_timm_s_lamb_goes_on(model: nn.Module) -> None:
    theirs, ours = copy.deepcopy(model), model
    old = timm_lamb(theirs)
    for step in range(3):
        give_gradients([theirs, ours], step)
        set_rates(old.param_groups, 0.01, 0.1)
        old.step()
    ours.load_state_dict(theirs.state_dict())
    stored = io.BytesIO()
    torch.save(old.state_dict(), stored)
    stored.seek(0)
    new = our_lamb(ours)
    new.load_state_dict(torch.load(stored, weights_only=True))
    for step in range(3, 6):
        give_gradients([theirs, ours], step)
        for optimizer in (old, new):
            set_rates(optimizer.param_groups, 0.01, 0.1)
            optimizer.step()
    assert error(ours, theirs) < 1e-6
    assert [group["step"] for group in new.param_groups] == [6, 6]
    state = new.state_dict()["state"]
    assert {key for values in state.values() for key in values} == {"exp_avg", "exp_avg_sq"}
    back = timm_lamb(theirs)
    back.load_state_dict(new.state_dict())
    back.step()


def test_adamw_by_rates_on_the_device_is_pytorch_s(model: nn.Module) -> None:
    truth, theirs, ours = copy.deepcopy(model).double(), copy.deepcopy(model), model
    options = OptimOptions(name="adamw", betas=list(BETAS))
    optimizers = [build_optimizer(each.named_parameters(), options, 0.0) for each in (truth, theirs, ours)]
    for step in range(20):
        give_gradients([truth, theirs, ours], step)
        for optimizer in optimizers:
            set_rates(optimizer.param_groups, 0.01 * (step + 1) / 20, 0.04 * step)
        for optimizer in optimizers[:2]:
            optimizer.step()
        numbers = optimizers[2].advance()
        assert [count for _, _, count in numbers] == [step + 1] * 2
        optimizers[2].move(to_device(numbers, torch.device("cpu")), [decay != 0 for _, decay, _ in numbers])
    assert 0 < error(ours, truth) <= 2 * error(theirs, truth) + 1e-7
    assert all(float(state["step"]) == 20 for state in optimizers[2].state.values())
    give_gradients([truth, theirs, ours], 20)
    optimizers[2].step()  # PyTorch's own goes on from there
    optimizers[1].step()
    assert error(ours, theirs) < 1e-5
    next(iter(optimizers[2].state.values()))["step"] += 1
    with pytest.raises(ValueError, match="different numbers of steps"):
        optimizers[2].advance()


def test_gradients_in_another_order_of_memory_count_the_same() -> None:
    weights = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    moved = []
    for memory in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weights.clone())
        parameter.grad = gradient.clone(memory_format=memory)
        Lamb([parameter], lr=0.1, weight_decay=0.1).step()
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=0)


def test_the_closure_runs_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Lamb([parameter], lr=0.1)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    assert bool((parameter < 1).all())


VIEWS = tuple(getattr(torch.ops.aten, name) for name in ("as_strided", "split_with_sizes", "unbind", "detach"))


class Reads(TorchDispatchMode):
    """Count the operators, and note those that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket not in VIEWS
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waiting.append(str(func))
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_nothing_is_read_back_and_the_calls_do_not_grow_with_the_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lamb, "on_cpu", lambda tensor: False)
    calls = []
    for count in (2, 40):
        parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(count)]
        optimizer = Lamb(parameters, lr=0.1, weight_decay=0.1)
        for parameter in parameters:
            parameter.grad = torch.randn(4, 4)
        optimizer.step()  # makes the state
        with Reads() as reads:
            optimizer.step()
        assert not reads.waiting
        calls.append(reads.calls)
    assert calls[0] == calls[1] <= 20


@pytest.mark.parametrize("limit", [5.0, 1e9, None])
def test_clipping_is_pytorch_s(limit: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(7, 3)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    twins = copy.deepcopy(parameters)
    for a, b in zip(parameters[:2], twins[:2], strict=True):
        a.grad = torch.randn(a.shape) * 10
        b.grad = a.grad.clone()
    norm = clip_gradients(iter(parameters), limit)
    expected = torch.nn.utils.clip_grad_norm_(twins, float("inf") if limit is None else limit)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(parameters[:2], twins[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_gradients_there_is_nothing_to_clip() -> None:
    assert float(clip_gradients([nn.Parameter(torch.zeros(3))], 1.0)) == 0.0


def test_weights_with_gaps_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(4, 6)[:, :3])
    parameter.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="contiguous"):
        Lamb([parameter], lr=0.1, weight_decay=0.1).step()
