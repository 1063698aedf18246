"""A run says how fast it was and where its time went, and its training never waits for the device."""

import csv
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spatspark_fast.models.spark import Observer
from spatspark_fast.pretrain.build import build_masks, build_model
from spatspark_fast.pretrain.clock import Lap, StepClock, _Mark
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.pretrain.module import SparkPretraining
from spatspark_fast.pretrain.run import COLUMNS
from spatspark_fast.training import lamb, recorder
from spatspark_fast.training.metrics import MetricsCsv
from spatspark_fast.training.reading import Reading
from spatspark_fast.training.schedules import make_plan
from spatspark_fast.training.speed import Speed

from .runs import checkpoint, pretrain, rows, same

SHARES = ("data_wait_share", "encoder_share", "decoder_share", "optimiser_share")


def test_a_run_reports_images_a_second_and_the_parts_of_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "run", model__encoder="resnet10t", trainer__savings="true") == 0
    said = capsys.readouterr().out
    found = re.search(
        r"Speed: ([\d.]+) images/s; of the time (\d+) % waiting for data, (\d+) % encoder, "
        r"(\d+) % densify, decoder and loss, (\d+) % clipping and optimiser",
        said,
    )
    assert found is not None, said
    assert "multiply-adds" in said
    assert sum(int(share) for share in found.groups()[1:]) <= 102
    for row in rows(tmp_path / "run"):
        shares = [float(row[name]) for name in SHARES]
        assert all(0 <= share < 1 for share in shares)
        assert all(share > 0.001 for share in shares[1:]), row
        assert sum(shares) <= 1
    session = json.loads((tmp_path / "run" / "versions.json").read_text())["sessions"][-1]
    speed, counted = session["speed"], session["multiply_adds_G"]
    assert counted["encoder_sparse"] == counted["encoder_dense"] / 2, "half of the patches are hidden"
    assert f"{counted['model_sparse']:.2f} instead of {counted['model_dense']:.2f} G" in said
    assert f"{speed['images_per_s']:.1f}" == found[1]
    assert set(speed) == {"images_per_s", *SHARES}


def test_the_parts_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow one part down, and see its share alone grow; the model is left as it was."""
    slow = 0.03
    clip, clipped = lamb.clip_gradients, []
    models = []

    def slowly(*args: Any) -> Tensor:
        time.sleep(slow)
        clipped.append(1)
        return clip(*args)

    monkeypatch.setattr("spatspark_fast.training.module.clip_gradients", slowly)
    remember = SparkPretraining.training_step
    monkeypatch.setattr(
        SparkPretraining,
        "training_step",
        lambda self, *a: models.append((self.spark, self.spark.observer)) or remember(self, *a),
    )
    assert pretrain(tmp_path / "run", trainer__epochs=1) == 0
    assert len(clipped) == 4
    for row in rows(tmp_path / "run"):
        windows = 2 / float(row["images_per_s"])
        assert float(row["optimiser_share"]) * windows >= slow
        assert (1 - float(row["optimiser_share"])) * windows > 0
    assert len(models) == 4
    for spark, observer in models:
        assert isinstance(observer, StepClock)
        assert type(spark.observer) is Observer, "the clock lets go of the model"
        assert not spark._forward_pre_hooks


def test_accumulated_batches_count_for_the_encoder_and_decoder_too(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", trainer__epochs=1, trainer__accumulate=2) == 0
    assert len(rows(tmp_path / "run")) == 2
    assert all(float(row["decoder_share"]) > 0 for row in rows(tmp_path / "run"))


def test_a_lap_adds_up_what_lies_between_its_marks() -> None:
    marks = [("other", 1.0), ("data", 1.5), ("encoder", 3.5), ("decoder", 4.5), ("encoder", 5.0), ("decoder", 5.25)]
    seconds = Lap([_Mark(*mark) for mark in marks]).seconds()
    assert seconds == {"data": 0.5, "encoder": 2.5, "decoder": 1.25, "optimiser": 0.0, "other": 0.0}


class Event:
    """Stand for a CUDA event that has passed."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def elapsed_time(self, later: "Event") -> float:
        return later.milliseconds - self.milliseconds


def test_events_of_a_gpu_are_read_in_milliseconds() -> None:
    lap = Lap([_Mark("other", Event(10.0)), _Mark("encoder", Event(260.0))])
    assert lap.seconds()["encoder"] == 0.25


def test_a_lap_begins_where_the_last_one_ended() -> None:
    clock = StepClock()
    clock.mark("other")
    clock.mark("data")
    first = clock.lap()
    clock.mark("encoder")
    second = clock.lap()
    assert first.seconds()["encoder"] == second.seconds()["data"] == 0
    assert second.seconds()["encoder"] > 0


def test_the_first_row_does_not_count_where_there_are_others() -> None:
    speed = Speed()
    row = speed.add(10, {"data": 5.0, "other": 5.0})
    assert row == {"images_per_s": 1.0, "data_wait_share": 0.5}
    assert speed.summary()["images_per_s"] == 1.0
    speed.add(10, {"data": 0.0, "other": 1.0})
    speed.add(30, {"data": 0.0, "other": 1.0})
    assert speed.summary() == {"images_per_s": 20.0, "data_wait_share": 0.0}


class Late(Reading):
    """Arrive when told, as numbers of a busy GPU do."""

    arrived = False
    waited = 0

    def ready(self) -> bool:
        return Late.arrived

    def get(self) -> dict[str, float]:
        Late.waited += not Late.arrived
        return super().get()


def test_rows_that_are_on_their_way_are_written_later_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrain(tmp_path / "early") == 0
    monkeypatch.setattr(recorder, "Reading", Late)
    written: list[tuple[int, int]] = []
    log = MetricsCsv.log_metrics
    steps: list[int] = []
    step = SparkPretraining.training_step
    monkeypatch.setattr(SparkPretraining, "training_step", lambda self, *a: steps.append(1) or step(self, *a))

    def note(self: MetricsCsv, metrics: dict[str, float], step: int | None = None) -> None:
        written.append((int(step or 0), len(steps)))
        log(self, metrics, step)

    monkeypatch.setattr(MetricsCsv, "log_metrics", note)
    Late.waited = 0
    assert pretrain(tmp_path / "late") == 0
    assert [step for step, _ in written] == list(range(1, 13))
    assert [done for _, done in written] == [4] * 4 + [8] * 4 + [12] * 4, "only checkpoints may wait"
    assert Late.waited == 12
    assert rows(tmp_path / "late", times=False) == rows(tmp_path / "early", times=False)


def test_a_reading_keeps_names_order_and_numbers() -> None:
    values: dict[str, float | Tensor] = {"a": 1, "b": torch.tensor(2.5), "c": 0.1, "d": torch.tensor(True)}
    reading = Reading(values)
    assert reading.ready()
    assert list(reading.get().items()) == [("a", 1.0), ("b", 2.5), ("c", 0.1), ("d", 1.0)]


def test_a_run_of_an_older_version_goes_on_in_its_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,loss\r\n1,0.5,0.9\r\n")
    MetricsCsv(path, COLUMNS).log_metrics({"epoch": 1.0, "loss": 0.8, "encoder_share": 0.1}, 2)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file))[1] == {"step": "2", "epoch": "1.0", "loss": "0.8"}


class Waiting(TorchDispatchMode):
    """Note the operators that would make the host wait for a GPU: those whose result the host needs."""

    HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in self.HOST:
            self.found.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decode_ratio", [1.0, 0.25])
def test_a_training_step_reads_nothing_back(decode_ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a step as a GPU would run it: with the engine in PyTorch operators, and the loss unread."""
    monkeypatch.setattr(lamb, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(SparkPretraining, "check_finite", lambda self: None)  # on a GPU not called in a step
    config = PretrainConfig()
    config.model.encoder, config.model.decoder_width, config.model.backend = "resnet10t", 64, "gather"
    config.model.decode_ratio, config.data.input_length, config.optim.clip = decode_ratio, 3, 0.0
    plan = make_plan(
        batches_per_epoch=4, epochs=2, max_steps=None, accumulate=1, warmup_epochs=0, windows_per_batch=2,
        base_lr=0.1, final_lr=0.1, weight_decay=0.1, weight_decay_end=0.1,
    )  # fmt: skip
    module = SparkPretraining(config, build_model(config), build_masks(config), plan)
    optimizer = module.configure_optimizers()
    frames = torch.rand(2, 3, 96, 96)

    def step(position: int) -> None:
        module.position = position
        module.training_step({"input": frames, "position": position}, 0).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    monkeypatch.setattr("lightning.LightningModule.global_rank", 0)
    step(0)
    with Waiting() as waiting:
        step(1)
    assert waiting.calls > 100
    assert not waiting.found


# Under warnings as errors, what dynamo looks at for itself ends its tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.rest
@pytest.mark.parametrize("mode", ["off", "default"])
def test_compiled_training_is_the_same_training(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without generating code: what is tested is where graphs begin and end, and the names of the weights."""
    compiled: list[str | None] = []

    def compile_eagerly(self: torch.nn.Module, mode: str | None = None) -> None:
        compiled.append(mode)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    changes = {"trainer__epochs": 1, "optim__ema": 0.9, "model__encoder": "resnet10t"}
    assert pretrain(tmp_path / "a", **changes) == 0
    assert pretrain(tmp_path / "b", trainer__compile=mode, **changes) == 0
    assert compiled == ([] if mode == "off" else [mode] * 3)
    a, b = (checkpoint(tmp_path / name) for name in "ab")
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert same(a["position"], b["position"])
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][key], value, rtol=1e-3, atol=1e-5)
    assert all(float(row["encoder_share"]) > 0 for row in rows(tmp_path / "b"))
