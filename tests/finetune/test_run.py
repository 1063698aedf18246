"""The command finetune from end to end, on small synthetic radar."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from spatspark_fast.common.options import from_plain, to_plain
from spatspark_fast.common.units import NL50_SCALE
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.finetune.config import FinetuneConfig
from spatspark_fast.finetune.module import begin_norms
from spatspark_fast.models.forecaster import Persistence
from spatspark_fast.models.registry import load_forecaster
from spatspark_fast.models.smaat import SmaAtUNet
from spatspark_fast.models.spatspark import SpatSpark, build_spatspark

from ..pretrain.runs import checkpoint, pretrain, rows, same
from .runs import arguments, finetune


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a real pretraining, ResNet with a U-Net decoder, 3 frames."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert pretrain(out, model__decoder="unet", model__decoder_width=128, trainer__epochs=2) == 0
    return out


@pytest.fixture(scope="module")
def finished(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run from pretrained weights, with all its outputs."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    more: dict[str, Any] = {
        "data__synthetic_windows": 20,
        "data__batch_size": 4,
        "optim__ema": 0.5,
        "trainer__epochs": 8,
        "trainer__keep_every": 5,
        "trainer__tensorboard": "true",
    }
    assert finetune(out, init=pretrained / "checkpoints" / "last.ckpt", **more) == 0
    return out


def weights_of(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def validation_windows(count: int = 20, held: int = 4, lengths: tuple[int, int] = (3, 3)) -> torch.Tensor:
    windows = SyntheticRadar(count, *lengths, 64)
    stacks = [torch.cat((windows[i]["input"], windows[i]["target"])) for i in range(count - held, count)]
    return torch.stack(stacks)


def squared_error(model: Any, stacks: torch.Tensor) -> float:
    """Return the squared error in (mm/5min)^2 by the shortest way."""
    with torch.no_grad():
        error = model(stacks[:, :3]).clamp(min=0) - stacks[:, 3:]
    return float(error.double().square().mean()) * NL50_SCALE**2


def test_the_run_directory_holds_what_it_promises(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"config.yaml", "versions.json", "metrics.csv", "forecast.png"}
    expected |= {f"checkpoints/{name}.ckpt" for name in ("last", "best", "epoch-0005")}
    assert expected == {name for name in names if not name.startswith("tensorboard/")}
    assert any("tfevents" in name for name in names)
    with Image.open(finished / "forecast.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_the_stored_options_go_back_in(finished: Path) -> None:
    plain = yaml.safe_load((finished / "config.yaml").read_text())
    config = from_plain(FinetuneConfig, plain)
    assert to_plain(config) == plain == checkpoint(finished)["config"]
    assert (config.model.encoder, config.model.decoder_width, config.data.input_length) == ("test_resnet", 128, 3)
    assert config.model.output_norm == "persistence", "the default"


def test_the_best_checkpoint_is_that_of_the_best_row(finished: Path) -> None:
    lines = [row for row in rows(finished) if row["validation_mse"]]
    scores = [float(row["validation_mse"]) for row in lines]
    assert [float(row["epoch"]) for row in lines] == list(range(1, 9))
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["validation"]["mse"] == min(scores)
    assert best["epoch"] == 1 + scores.index(min(scores))
    assert len([row for row in rows(finished) if row["loss"]]) == 32


def test_two_windows_are_learned_by_heart(pretrained: Path, tmp_path: Path) -> None:
    changes = {"data__synthetic_windows": 2, "data__validation_fraction": 0, "trainer__epochs": 40}
    init = pretrained / "checkpoints" / "last.ckpt"
    assert finetune(tmp_path / "run", init=init, optim__base_lr=1.0, loss__ssim_weight=0, **changes) == 0
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    stacks = validation_windows(2, 2)
    loaded = load_forecaster(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert squared_error(loaded.model, stacks) < 0.6 * losses[0], "in evaluation mode too"


@torch.no_grad()
def test_norms_that_have_seen_little_begin_with_real_statistics() -> None:
    torch.manual_seed(0)
    model = build_spatspark("resnet18", 3, 3, decoder_width=64).train()
    frames = validation_windows(4, 4)[:, :3]
    expected = model(frames)  # by the statistics of the batch
    model = build_fresh(model)
    settled, fresh = model.encoder.bn1, model.densify.levels[0].norm
    settled.num_batches_tracked.fill_(1000)
    begin_norms(model, frames)
    assert settled.running_var.eq(1).all()
    assert settled.num_batches_tracked == 1000
    assert fresh.running_var.max() < 0.9
    assert fresh.momentum == 0.1
    model.encoder.bn1.num_batches_tracked.fill_(0)
    begin_norms(model, frames)
    assert model.encoder.bn1.running_var.max() < 1e-2, "rain in data units is small"
    error = (model.eval()(frames) - expected).std() / expected.std()
    assert error < 0.15  # running variances are unbiased, those of a batch are not


def build_fresh(model: Any) -> Any:
    """Return the model with all running statistics as they are made."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def test_the_validation_score_is_the_error_of_the_best_checkpoint(finished: Path) -> None:
    stacks = validation_windows()
    loaded = load_forecaster(finished / "checkpoints" / "best.ckpt")
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert squared_error(loaded.model, stacks) == pytest.approx(best["validation"]["mse"], rel=1e-5)
    saved = checkpoint(finished)["callbacks"]["Validation"]
    assert squared_error(Persistence(3, 3), stacks) == pytest.approx(saved["persistence"]["mse"], rel=1e-5)
    wet = (loaded.model.predict(stacks[:, :3]) * NL50_SCALE * 12 > 1, stacks[:, 3:] * NL50_SCALE * 12 > 1)
    csi = float((wet[0] & wet[1]).sum() / (wet[0] | wet[1]).sum())
    assert csi == pytest.approx(best["validation"]["csi@1"], abs=1e-3)


def test_checkpoints_load_as_forecasters_and_the_average_is_what_is_kept(finished: Path) -> None:
    loaded = load_forecaster(finished / "checkpoints" / "last.ckpt")
    assert isinstance(loaded.model, SpatSpark)
    assert (loaded.in_length, loaded.out_length, loaded.scale, loaded.multiple) == (3, 3, NL50_SCALE, 32)
    assert "pretrained" in loaded.name
    last = finished / "checkpoints" / "last.ckpt"
    assert same(dict(loaded.model.state_dict()), weights_of(last, "ema.module."))
    assert not same(weights_of(last, "ema.module."), weights_of(last, "model."))


def test_training_starts_from_the_pretrained_weights(pretrained: Path, tmp_path: Path) -> None:
    init = pretrained / "checkpoints" / "last.ckpt"
    out = tmp_path / "run"
    assert finetune(out, init=init, model__freeze="both", trainer__epochs=1) == 0
    theirs, ours = weights_of(init, "spark."), weights_of(out / "checkpoints" / "last.ckpt", "model.")
    assert theirs.keys() == {name for name in ours if not name.startswith("translation.")}
    head = {name for name in theirs if name.startswith("decoder.head.")}  # of changes, begins anew and learns
    kept = theirs.keys() - head
    assert same({name: theirs[name] for name in kept}, {name: ours[name] for name in kept}), "frozen: bit by bit"
    assert not same({name: theirs[name] for name in head}, {name: ours[name] for name in head})


def test_another_number_of_frames_renews_the_head_and_says_so(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = pretrained / "checkpoints" / "last.ckpt"
    assert finetune(tmp_path / "run", init=init, data__output_length=5, trainer__epochs=1, optim__base_lr=1e-9) == 0
    assert "the decoder's last layer begins anew for 5 frames of change" in capsys.readouterr().out
    loaded = load_forecaster(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert loaded.model(torch.rand(1, 3, 64, 96)).shape == (1, 5, 64, 96)
    ours, theirs = loaded.model.state_dict(), weights_of(init, "spark.")
    torch.testing.assert_close(ours["decoder.blocks.0.conv1.weight"], theirs["decoder.blocks.0.conv1.weight"])
    assert ours["decoder.head.weight"].shape[0] == 5


def test_an_encoder_alone_is_enough_to_start_from(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = pretrained / "encoder.safetensors"
    changes = {"data__input_length": 3, "model__decoder": "light", "model__decoder_width": 16}
    assert finetune(tmp_path / "run", init=init, model__freeze="encoder", trainer__epochs=1, **changes) == 0
    assert "decoder begin anew" in capsys.readouterr().out
    theirs = weights_of(pretrained / "checkpoints" / "last.ckpt", "spark.encoder.")
    assert same(theirs, weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt", "model.encoder."))


def test_a_finetuned_model_can_be_finetuned_again(finished: Path, tmp_path: Path) -> None:
    init = finished / "checkpoints" / "best.ckpt"
    assert finetune(tmp_path / "run", init=init, trainer__epochs=1, optim__base_lr=1e-9) == 0
    stacks = validation_windows(10, 2)
    ours, theirs = (load_forecaster(p).model for p in (tmp_path / "run" / "checkpoints" / "best.ckpt", init))
    assert isinstance(ours, SpatSpark)
    torch.testing.assert_close(
        dict(ours.translation.named_parameters()),
        dict(theirs.translation.named_parameters()),  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    )
    assert math.isfinite(squared_error(ours, stacks))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__kind": "spark"},
        {"model__kind": "smaat", "model__base_width": 8},
        {"model__translation": "recurrent", "data__output_length": 5, "loss__weighting": "rain"},
        {"model__translation": "attention", "loss__spectral_weight": 0.5, "trainer__precision": "bf16"},
        {"data__validation_fraction": 0, "optim__name": "lamb", "trainer__accumulate": 2},
        {"trainer__score": "csi", "trainer__validate_every": 2, "optim__ema": 0.9},
    ],
    ids=["spark", "smaat", "recurrent", "attention", "no validation", "csi"],
)
def test_other_models_and_losses_train_from_scratch(changes: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finetune(out, trainer__epochs=2, **changes) == 0
    loaded = load_forecaster(out / "checkpoints" / "best.ckpt")
    assert isinstance(loaded.model, SmaAtUNet if changes.get("model__kind") == "smaat" else SpatSpark)
    assert loaded.out_length == changes.get("data__output_length", 3)
    losses = [float(row["loss"]) for row in rows(out) if row["loss"]]
    assert all(math.isfinite(loss) for loss in losses)
    validated = [row for row in rows(out) if row["validation_mse"]]
    assert len(validated) == (0 if "data__validation_fraction" in changes else 1 if "trainer__score" in changes else 2)


def test_the_demo_preset_is_what_no_option_means() -> None:
    argv = [sys.executable, "-m", "spatspark_fast.finetune", "--print_config"]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    plain = yaml.safe_load(shown.stdout)
    assert plain["data"]["path"] is None
    assert plain["data"]["synthetic_size"] == 128
    assert plain.keys() >= to_plain(FinetuneConfig()).keys()


WITHOUT_ENGINES = """
import sys
for name in ("triton", "MinkowskiEngine", "patchsparse._engine"):
    sys.modules[name] = None  # importing it raises ImportError
from spatspark_fast.finetune.__main__ import main
code = main(sys.argv[1:])
import torch
from spatspark_fast.models.registry import load_forecaster
assert code == 0, code
model = load_forecaster(sys.argv[-1].removeprefix("--out=") + "/checkpoints/best.ckpt").model
assert model.predict(torch.rand(1, 3, 70, 50)).shape == (1, 3, 70, 50)
loaded = [name for name in sys.modules if name.startswith("patchsparse.backends.") and sys.modules[name]]
print("loaded:", sorted(name for name in loaded if name.split(".")[2] == "triton"))
"""


def test_finetuning_and_forecasting_need_no_engine(pretrained: Path, tmp_path: Path) -> None:
    """Neither Triton nor MinkowskiEngine can be imported, and there is no compiled engine."""
    argv = arguments(tmp_path / "run", init=pretrained / "checkpoints" / "last.ckpt", trainer__epochs=1)
    environment = os.environ | {"PATCHSPARSE_ENGINE": "/nonexistent/engine.so", "OMP_NUM_THREADS": "1"}
    out, *others = argv
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ENGINES, *others, out],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout
