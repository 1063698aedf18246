"""A captured training is the training: replays on new data, masks and rates give the bits of the same steps without."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatspark_fast.finetune import run as finetuning
from spatspark_fast.models.spark import SparK
from spatspark_fast.pretrain import run as pretraining
from spatspark_fast.pretrain.__main__ import main
from spatspark_fast.training import captured, comparison, cuda_graphs, lamb, module
from spatspark_fast.training.adamw import AdamW
from spatspark_fast.training.captured import CapturedStep, Inputs, Taken
from spatspark_fast.training.device_rates import to_device
from spatspark_fast.training.metrics import MetricsCsv

from ..finetune.runs import finetune
from ..matrix import rest_but
from ..pretrain.runs import checkpoint, pretrain, rows, same_training
from .recorded import RecordedGraphs

INTERVAL = {"mask__schedule": "interval", "mask__ratio": 0.3, "mask__ratio_end": 0.8}
UNET = {"model__decoder": "unet", "model__decoder_width": 32}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    """Let a CPU take the ways of a GPU, and a replay differ in no bit from the step kernel by kernel."""
    for name in (lamb, module):
        monkeypatch.setattr(name, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(comparison, "FAR", 0.0)
    monkeypatch.setattr(AdamW, "step", by_rates)
    return RecordedGraphs()


def by_rates(self: AdamW, closure: Callable[[], Any] | None = None) -> Any:
    """Take AdamW's step by the kernel of captured steps, in place of PyTorch's own, which rounds otherwise."""
    with torch.enable_grad():
        loss = None if closure is None else closure()
    numbers = self.advance()
    self.move(to_device(numbers, torch.device("cpu")), [decay != 0 for _, decay, _ in numbers])
    return loss


@pytest.fixture
def capture(graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RecordedGraphs]:
    """Return a function from which on runs of this process capture their steps."""

    def begin() -> RecordedGraphs:
        for run in (pretraining, finetuning):
            monkeypatch.setattr(run, "choose_graphs", lambda *asked: graphs)
        return graphs

    return begin


def drop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add dropout to the model, so that the random generators matter."""
    build = pretraining.build_model

    def build_noisy(config: Any) -> SparK:
        model = build(config)

        def dropped(part: nn.Module, given: Any, levels: list[Tensor]) -> list[Tensor]:
            return [F.dropout(level, 0.2) for level in levels]

        model.densify.register_forward_hook(dropped)
        return model

    monkeypatch.setattr(pretraining, "build_model", build_noisy)


PLAIN = {"trainer__epochs": 2}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "lamb": (PLAIN, 1),
    "averaged, clipped, by another number of visible patches": (
        INTERVAL | {"optim__ema": 0.9, "optim__clip": 0.005, "trainer__epochs": 6},
        2,
    ),
    "accumulated": ({"trainer__accumulate": 3, "trainer__epochs": 4, "optim__ema": 0.9}, 3),
    "adamw, sparse decoding, rain": (
        UNET | PLAIN | {"optim__name": "adamw", "model__decode_ratio": 0.25, "mask__strategy": "rain"},
        1,
    ),
    "half precision": (PLAIN | UNET | {"trainer__precision": "bf16"}, 1),
    "weight decay from 0": (PLAIN | {"optim__weight_decay": 0.0}, 1),
}


@pytest.mark.parametrize("case", rest_but(["lamb", "accumulated"], list(CASES)))
def test_replayed_pretraining_has_the_bits_of_pretraining(
    case: str, capture: Callable[[], RecordedGraphs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes, least = CASES[case]
    drop(monkeypatch)
    changes = {"model__backend": "gather", "data__synthetic_windows": 10} | changes
    assert pretrain(tmp_path / "eager", **changes) == 0
    graphs = capture()
    capsys.readouterr()
    assert pretrain(tmp_path / "graph", **changes) == 0
    said = capsys.readouterr().out
    assert same_training(checkpoint(tmp_path / "eager"), checkpoint(tmp_path / "graph"))
    assert shares_apart(rows(tmp_path / "eager", times=False)) == shares_apart(rows(tmp_path / "graph", times=False))
    assert graphs.captures >= least, said
    assert graphs.replays > graphs.captures  # each is compared once, by a replay
    assert said.count("Captured a training step as a graph") == graphs.captures
    assert "kernel by kernel" not in said


def shares_apart(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows without the share of whole steps, which a clock gives."""
    return [{name: row[name] for name in row if name != "step_share"} for row in table]


def test_a_captured_step_is_shown_as_a_whole(
    capture: Callable[[], RecordedGraphs], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture()
    assert pretrain(tmp_path / "run", model__backend="gather", trainer__epochs=1) == 0
    assert "% whole training steps" in capsys.readouterr().out
    for row in rows(tmp_path / "run"):
        assert 0 < float(row["step_share"]) <= 1
        assert row["encoder_share"] == row["decoder_share"] == row["optimiser_share"] == ""


@pytest.mark.parametrize("name", rest_but(["lamb"], ["lamb", "adamw"]))
def test_a_captured_run_that_is_stopped_goes_on_bit_by_bit(
    name: str, capture: Callable[[], RecordedGraphs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model__backend": "gather", "optim__name": name, "optim__ema": 0.9, "trainer__epochs": 3}
    assert pretrain(tmp_path / "eager", **changes) == 0
    graphs = capture()
    log = MetricsCsv.log_metrics

    def log_and_stop(self: MetricsCsv, metrics: dict[str, float], at: int | None = None) -> None:
        log(self, metrics, at)
        if at == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCsv, "log_metrics", log_and_stop)
        assert pretrain(tmp_path / "graph", **changes) == 143
    assert checkpoint(tmp_path / "graph")["global_step"] == 6
    assert pretrain(tmp_path / "graph", "--resume", **changes) == 0
    assert same_training(checkpoint(tmp_path / "eager"), checkpoint(tmp_path / "graph"))
    assert graphs.captures == 2


def test_replayed_finetuning_has_the_bits_of_finetuning(
    capture: Callable[[], RecordedGraphs], tmp_path: Path
) -> None:  # fmt: skip
    changes = {"loss__weighting": "rain", "loss__spectral_weight": 0.1, "optim__ema": 0.9, "trainer__epochs": 2}
    assert finetune(tmp_path / "eager", **changes) == 0
    graphs = capture()
    assert finetune(tmp_path / "graph", **changes) == 0
    assert same_training(checkpoint(tmp_path / "eager"), checkpoint(tmp_path / "graph"))
    assert rows(tmp_path / "eager", times=False) == rows(tmp_path / "graph", times=False)
    assert graphs.captures == 1
    assert graphs.replays > 2


class Line(nn.Module):
    """Learn numbers by a product with them; ``odd`` is done besides."""

    def __init__(self, odd: Callable[[Tensor], Any] = lambda loss: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.odd = odd

    def loss(self, frames: Tensor, noise: Any, counts: tuple[int, ...]) -> Tensor:
        """Return the loss of the first ``counts[0]`` rows."""
        loss = ((frames[: counts[0]] @ self.weight.T - 1) * noise[0][: counts[0]]).square().sum()
        self.odd(loss)
        return loss


class Pair:
    """Train a `Line` by a captured step, and another one without graphs."""

    def __init__(self, graphs: RecordedGraphs, odd: Callable[[Tensor], Any] = lambda loss: None) -> None:
        self.said: list[str] = []
        self.lines = Line(odd), Line()
        self.optimizers = [lamb.Lamb(line.parameters(), lr=0.1, weight_decay=0.1) for line in self.lines]
        self.step = CapturedStep(
            self.lines[0], self.lines[0].loss, self.optimizers[0], graphs, clip=1.0, say=self.said.append
        )
        self.number = 0

    def train(self, *counts: int) -> None:
        """Train a step with each of these counts; see that both lines and their losses agree."""
        for count in counts:
            self.number += 1
            generator = torch.Generator().manual_seed(self.number)
            frames, noise = (torch.rand(size, generator=generator) for size in ((8, 3), (8, 1)))
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = 0.1 / self.number
            taken = self.step(Inputs(frames, (noise,), (count,), f"{count} rows"))
            self.optimizers[1].zero_grad()
            loss = self.lines[1].loss(frames, [noise], (count,))
            loss.backward()
            norm = lamb.clip_gradients(self.lines[1].parameters(), 1.0)
            self.optimizers[1].step()
            assert torch.equal(taken.loss, loss.detach())
            assert taken.norm is not None
            assert torch.equal(taken.norm, norm)
            assert torch.equal(self.lines[0].weight, self.lines[1].weight)


def test_another_number_of_patches_is_captured_again_and_a_line_says_so(graphs: RecordedGraphs) -> None:
    pair = Pair(graphs)
    pair.train(*[4] * 5, *[6] * 4, *[4, 6] * 3)
    assert graphs.captures == 2
    assert pair.step.replayed == 2 + 1 + 6
    assert pair.said == [
        "Captured a training step as a graph: 4 rows; 1 kept",
        "Captured a training step as a graph: 6 rows; 2 kept",
    ]


def test_no_more_graphs_than_the_bound_are_kept(graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "KEPT", 2)
    monkeypatch.setattr(captured, "PATIENCE", 10)
    pair = Pair(graphs)
    pair.train(*[2, 3, 4, 5] * 4)
    assert graphs.captures == 2
    assert pair.said[2:] == ["More than 2 kinds of training steps take turns: the others run kernel by kernel"]
    pair.train(*[5] * 12)  # the others rest
    assert graphs.captures == 3
    assert pair.said[-1] == "Captured a training step as a graph: 5 rows; 2 kept"


def test_graphs_make_room_for_steps_without_one(graphs: RecordedGraphs) -> None:
    pair = Pair(graphs)
    pair.train(4, 4, 4)
    graphs.short = True
    pair.train(4, 6, 4, 4)
    assert graphs.captures == 2
    assert len(pair.said) == 2


ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a read": (lambda loss: float(loss.detach()), "_local_scalar_dense reads a value of the device"),
    "an index": (lambda loss: loss.expand(2)[loss.expand(2) > 0], "by a mask makes a shape from values"),
    "numbers of the host": (lambda loss: torch.tensor([1.0]), "lift_fresh brings numbers of the host into the step"),
    "a choice": (lambda loss: loss.expand(2).nonzero(), "nonzero reads a value"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_no_graph_can_hold_leaves_the_training_as_it_is(what: str, graphs: RecordedGraphs) -> None:
    odd, why = ODD[what]
    pair = Pair(graphs, odd)
    pair.train(*[4] * 6)
    assert graphs.captures == graphs.replays == 0
    assert len(pair.said) == 1
    assert pair.said[0].startswith("Training steps run kernel by kernel, without a CUDA graph: ForbiddenError: ")
    assert why in pair.said[0]
    assert all(line.weight.grad is None for line in pair.lines[:1])


class Broken(RecordedGraphs):
    """Replay a step that leaves some tensors as they were, as a graph would that has lost an operator."""

    still: tuple[Tensor, ...] = ()

    def capture(self, run: Callable[[], Taken]) -> tuple[Callable[[], None], Taken]:
        replay, taken = super().capture(run)

        def partly() -> None:
            before = [tensor.detach().clone() for tensor in self.still]
            replay()
            for tensor, value in zip(self.still, before, strict=True):
                tensor.detach().copy_(value)

        return partly, taken


def test_a_replay_that_differs_is_refused_before_it_is_used(
    graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "FAR", 0.1)
    broken = Broken()
    pair = Pair(broken)
    broken.still = (pair.lines[0].weight,)
    pair.train(*[4] * 6)
    assert broken.captures == 1
    assert broken.replays == 1
    assert len(pair.said) == 1
    assert "the first replay differs from the step kernel by kernel (weights by" in pair.said[0]


def test_where_there_are_no_graphs_one_line_says_why() -> None:
    said: list[str] = []
    choose = cuda_graphs.choose_graphs
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert choose("auto", cpu, 1, said.append) is choose("off", cpu, 1, said.append) is None
    assert choose("off", gpu, 4, said.append) is None
    assert said == []
    assert choose("on", cpu, 1, said.append) is choose("auto", gpu, 4, said.append) is None
    assert [line.split(": ")[1] for line in said] == [
        "a CUDA graph needs a GPU, and training runs on cpu",
        "4 devices exchange gradients in a step, which no graph here holds",
    ]


def test_asking_for_graphs_on_a_cpu_trains_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "run", trainer__graph="on", trainer__epochs=1) == 0
    assert capsys.readouterr().out.count("without a CUDA graph: a CUDA graph needs a GPU") == 1


def test_a_run_of_the_time_of_reduce_overhead_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "run", trainer__epochs=1) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    old = torch.load(path, weights_only=True)
    old["config"]["trainer"]["compile"] = "reduce-overhead"
    del old["config"]["trainer"]["graph"]
    torch.save(old, path)
    compiled: list[str | None] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: compiled.append(mode))
    capsys.readouterr()
    assert main([f"--out={tmp_path / 'run'}", "--resume", "--trainer.epochs=2"]) == 0
    assert compiled == ["default"] * 3
    said = capsys.readouterr().out
    assert "Note: --trainer.compile reduce-overhead is now --trainer.compile default and --trainer.graph auto" in said
    config = checkpoint(tmp_path / "run")["config"]["trainer"]
    assert (config["compile"], config["graph"]) == ("default", "auto")
