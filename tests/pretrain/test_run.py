"""The command pretrain from end to end, on small synthetic radar and on real KNMI frames."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib.colors import to_rgb
from PIL import Image
from safetensors.torch import load_file

from spatspark_fast.common.options import from_plain, to_plain
from spatspark_fast.common.plots import RAIN_COLOURS
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.reader import Reader
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.prepare import __main__ as prepare
from spatspark_fast.pretrain.build import build_masks, build_model
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training import schedules
from spatspark_fast.training.module import step_seed
from spatspark_fast.training.stream import BatchStream, epoch_order

from .runs import arguments, checkpoint, pretrain, rows, same, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with all its outputs."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    changes: dict[str, Any] = {
        "data__synthetic_windows": 16,
        "data__synthetic_size": 96,
        "data__batch_size": 4,
        "model__encoder": "resnet10t",
        "model__decoder": "unet",
        "model__decoder_width": 64,
        "optim__name": "adamw",
        "optim__base_lr": 0.3,
        "optim__ema": 0.5,
        "trainer__epochs": 10,
        "trainer__picture_every": 6,
        "trainer__keep_every": 7,
        "trainer__tensorboard": "true",
        "trainer__savings": "true",
    }
    assert pretrain(out, **changes) == 0
    return out


def test_the_run_directory_holds_what_it_promises(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"config.yaml", "versions.json", "metrics.csv", "reconstruction.png", "encoder.safetensors"}
    expected |= {"checkpoints/last.ckpt", "checkpoints/epoch-0007.ckpt"}
    expected |= {"pictures/epoch-6.png", "pictures/epoch-10.png"}
    assert expected == {name for name in names if not name.startswith("tensorboard/")}
    assert any("tfevents" in name for name in names)


def test_the_stored_options_go_back_in(finished: Path) -> None:
    plain = yaml.safe_load((finished / "config.yaml").read_text())
    config = from_plain(PretrainConfig, plain)
    assert to_plain(config) == plain == checkpoint(finished)["config"]
    assert config.model.encoder == "resnet10t"


def test_versions_and_seed_are_recorded(finished: Path) -> None:
    record = json.loads((finished / "versions.json").read_text())
    assert record["seed"] == 0
    (session,) = record["sessions"]
    assert session["versions"]["torch"] == torch.__version__.split("+")[0]
    assert session["device"].startswith(("cpu", "cuda"))


def test_rows_follow_the_plan(finished: Path) -> None:
    lines = rows(finished)
    assert [int(row["step"]) for row in lines] == list(range(1, 41))
    assert float(lines[-1]["epoch"]) == 10
    rates = [float(row["lr"]) for row in lines]
    assert max(rates) == pytest.approx(0.3 * 4 / 256)
    assert rates[-1] == pytest.approx(0.001 * 0.3 * 4 / 256)
    assert all(0 <= float(row["data_wait_share"]) <= 1 and float(row["images_per_s"]) > 0 for row in lines)


def losses_before_and_after(out: Path, frames: torch.Tensor) -> tuple[float, float]:
    """Return the loss on ``frames`` under fixed masks, of the run's model as it was built and as it ended."""
    config = from_plain(PretrainConfig, checkpoint(out)["config"])
    grid = build_masks(config).draw(frames, 0.5, torch.Generator().manual_seed(7))
    torch.manual_seed(config.trainer.seed)
    model = build_model(config)
    with torch.no_grad():
        before = model(frames, grid).loss
        state = checkpoint(out)["state_dict"]
        model.load_state_dict({k.removeprefix("spark."): v for k, v in state.items() if k.startswith("spark.")})
        return float(before), float(model(frames, grid).loss)


def test_the_loss_falls_on_what_was_seen(finished: Path) -> None:
    windows = SyntheticRadar(16, 3, 0, 96)
    before, after = losses_before_and_after(finished, torch.stack([windows[i]["input"] for i in range(16)]))
    assert after < 0.99 * before


def test_the_exported_weights_are_the_average_and_load_into_timm(finished: Path) -> None:
    weights = load_file(finished / "encoder.safetensors")
    model = timm.create_model("resnet10t", in_chans=3)
    found = model.load_state_dict(weights, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    state = checkpoint(finished)["state_dict"]
    average, newest = (
        {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}
        for p in ("ema.module.encoder.", "spark.encoder.")
    )
    assert average.keys() == newest.keys()
    assert same(load_file(finished / "encoder.safetensors")["layer1.0.conv1.weight"], average["layer1.0.conv1.weight"])
    assert not torch.equal(average["layer1.0.conv1.weight"], newest["layer1.0.conv1.weight"])


def test_the_picture_shows_rain(finished: Path) -> None:
    with Image.open(finished / "reconstruction.png") as image:
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 50


def test_a_run_is_never_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert pretrain(finished) == 2
    error = capsys.readouterr().err
    assert "already holds a run" in error
    assert "--resume" in error
    assert (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_a_batch_larger_than_the_data_shrinks_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "run", data__batch_size=128, trainer__epochs=2) == 0
    assert "there are 8 windows, so a batch has 8 instead of 128" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run")["batches_per_epoch"] == 1
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert max(rates) <= 0.1 * 8 / 256


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lr = schedules.Plan.lr
    monkeypatch.setattr(schedules.Plan, "lr", lambda self, step: lr(self, step) if step < 5 else 1e30)
    assert pretrain(tmp_path / "run", optim__name="adamw") == 2
    error = capsys.readouterr().err
    assert "no longer finite" in error
    assert error.count("\n") == 1
    state = checkpoint(tmp_path / "run")
    assert state["position"] == 4
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_the_summary_compares_epochs_also_when_rows_span_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def summary(name: str, log_every: int) -> str:
        assert pretrain(tmp_path / name, trainer__log_every=log_every) == 0
        return capsys.readouterr().out.partition("mean loss ")[2].rpartition("mean loss ")[2].splitlines()[0]

    often, seldom = summary("often", 1), summary("seldom", 12)
    losses = [float(row["loss"]) for row in rows(tmp_path / "often")]
    first, last = np.mean(losses[:4]), np.mean(losses[-4:])
    assert often == seldom == f"{first:.4f} in the first epoch, {last:.4f} in the last"


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(arguments(out, trainer__device="cpu", trainer__devices=2, trainer__epochs=2), strict=False)
    try:
        said, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, said
    assert [(int(row["step"]), float(row["epoch"])) for row in rows(out)] == [(1, 0.5), (2, 1), (3, 1.5), (4, 2)]
    state = checkpoint(out)
    assert (state["position"], state["batches_per_epoch"]) == (4, 2)


def test_bf16_trains_with_float32_weights(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", trainer__precision="bf16", trainer__epochs=1) == 0
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert all(np.isfinite(float(row["loss"])) for row in rows(tmp_path / "run"))


def test_accumulation_steps_once_for_its_batches_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", trainer__accumulate=3, trainer__epochs=2) == 0
    lines = rows(tmp_path / "run")
    assert [(int(row["step"]), float(row["epoch"])) for row in lines] == [(1, 0.75), (2, 1), (3, 1.75), (4, 2)]


def test_the_schedule_of_the_mask_ratio_is_followed(tmp_path: Path) -> None:
    changes = {"mask__schedule": "linear", "mask__ratio": 0.25, "mask__ratio_end": 0.75}
    assert pretrain(tmp_path / "run", trainer__epochs=1, **changes) == 0
    ratios = [float(row["mask_ratio"]) for row in rows(tmp_path / "run")]
    assert ratios == pytest.approx(np.linspace(0.25, 0.75, 4))


class Windows:
    """Serve windows that say which they are, and in which epoch they were read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": torch.tensor([[[float(self.epoch), float(index)]]]), "index": index}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_a_function_of_seed_and_position(workers: int) -> None:
    stream = BatchStream(Reader(Windows(11), workers), range(11), 2, seed=3)
    whole = [batch for _ in range(3) for batch in stream]
    assert [batch["position"] for batch in whole] == list(range(15))
    for batch in whole:
        epoch, place = divmod(batch["position"], 5)
        expected = epoch_order(11, 3, epoch)[2 * place : 2 * place + 2].tolist()
        assert batch["index"].tolist() == expected
        assert batch["input"][:, 0, 0].tolist() == [[epoch, index] for index in expected]
    later = BatchStream(Reader(Windows(11), workers), range(11), 2, seed=3)
    later.load_state_dict({"position": 7})
    again = [batch for _ in range(2) for batch in later]
    assert same(again, whole[7:])


def test_devices_share_each_batch_without_overlap() -> None:
    streams = [BatchStream(Reader(Windows(12)), range(12), 2, rank=rank, world_size=3) for rank in range(3)]
    seen = [index for batches in zip(*streams, strict=True) for batch in batches for index in batch["index"].tolist()]
    assert sorted(seen) == list(range(12))


def test_epochs_differ_and_seeds_differ() -> None:
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert len({step_seed(s, p, r) for s in (0, 1) for p in range(50) for r in (0, 1)}) == 200


@pytest.mark.drawn
def test_real_knmi_rain_trains(radar: Path, tmp_path: Path) -> None:
    file = tmp_path / "knmi.h5"
    argv = ["--source=knmi", f"--data.path={radar / 'knmi_201008'}", f"--out={file}", "--stride=6"]
    assert prepare.main([*argv, "--data.input_length=4", "--data.output_length=2", "--wet_fraction=0.1"]) == 0
    changes: dict[str, Any] = {
        "data__path": file,
        "data__input_length": 4,
        "data__batch_size": 4,
        "data__flip": "true",
        "model__decoder": "unet",
        "model__decoder_width": 32,
        "optim__name": "adamw",
        "optim__base_lr": 0.3,
        "trainer__epochs": 12,
    }
    out = tmp_path / "run"
    assert pretrain(out, **changes) == 0
    windows = NowcastDataset(file, "train", input_length=4, output_length=0)
    frames = torch.stack([windows[i]["input"] for i in range(len(windows))])
    assert frames.shape[1:] == (4, 288, 288)
    before, after = losses_before_and_after(out, frames)
    assert after < 0.97 * before
    with Image.open(out / "reconstruction.png") as image:
        drawn = {tuple(colour) for colour in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    rain = {tuple(round(255 * part) for part in to_rgb(colour)) for colour in RAIN_COLOURS[:4]}
    assert rain <= drawn
