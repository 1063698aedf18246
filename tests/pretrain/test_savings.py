"""What the sparse path saves is said at the end of every run: for all encoders, decoders and presets, by default."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from patchsparse import PatchGrid, sparsify
from spatspark_fast.models.spark import SparK, build_spark
from spatspark_fast.pretrain import savings
from spatspark_fast.pretrain.__main__ import main
from spatspark_fast.pretrain.build import build_model
from spatspark_fast.pretrain.cli import COMMAND, parse_pretrain
from spatspark_fast.pretrain.savings import describe_savings, measure_encoder
from spatspark_fast.training.command import preset_names

from ..matrix import pairwise, rest_but
from .runs import same

MEASURED = re.compile(
    r"Counted, one (\d+)x\1 window, \d+ % hidden, .* G dense-and-mask, ([\d.]+)x fewer; the whole model .*x fewer\.\n"
    r"Measured here and now \(.*\): [\d.e-]+ s instead of [\d.e-]+ s dense-and-mask, [\d.]+x as fast; "
    r"features equal to (\de[+-]\d\d)\."
)
SMALL = ("test_resnet", "test_convnext2", "test_efficientnet_ln", "test_byobnet")  # one of each family
REAL = ("resnet18", "resnet50", "convnext_tiny", "convnextv2_atto", "efficientnet_b0", "vgg11_bn", "densenet121")


def built(encoder: str, decoder: str = "light", scaling: str = "log") -> tuple[SparK, Tensor, PatchGrid]:
    """Return a small model whose parameters are all at work, frames of rain, and a grid."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"decoder": decoder, "input_scaling": scaling}
    model = build_spark(encoder, in_chans=2, decoder_width=32, **options)
    with torch.no_grad():
        for parameter in model.encoder.parameters():  # a layer scale of 1e-6 would hide a difference
            parameter.add_(0.05 * torch.randn_like(parameter))
    grid = PatchGrid.random(2, (3, 3), 4, generator=torch.Generator().manual_seed(0))
    return model, 0.01 * torch.rand(2, 2, 96, 96), grid


@pytest.mark.parametrize(("encoder", "decoder", "scaling"), pairwise(SMALL, ("light", "unet"), ("log", "none")))
def test_the_rival_of_the_measurement_computes_the_same_features(encoder: str, decoder: str, scaling: str) -> None:
    model, frames, grid = built(encoder, decoder, scaling)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure_encoder(model, frames, grid, rounds=1)
    assert found.difference < savings.PARITY / 10
    assert found.sparse > 0
    assert found.dense > 0
    assert same(dict(model.state_dict()), before)


@pytest.mark.rest
@pytest.mark.parametrize("encoder", REAL)
def test_what_is_saved_is_measured_for_every_family(encoder: str) -> None:
    model, frames, _ = built(encoder)
    assert MEASURED.fullmatch(describe_savings(model, frames, 0.6))


def test_paths_that_are_dropped_are_dropped_in_both() -> None:
    model, frames, grid = built("test_convnext2")
    plain = timm.create_model("test_convnext2", in_chans=2, features_only=True, drop_path_rate=0.9, ls_init_value=1.0)
    model.encoder = sparsify(plain)
    assert measure_encoder(model, frames, grid, rounds=1).rounds == 1


def test_a_rival_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    masking = savings.DenseAndMask
    monkeypatch.setattr(savings, "DenseAndMask", lambda model, grid: masking(model, grid.complement()))
    found = measure_encoder(*built("test_resnet"), rounds=1)
    assert found.difference > savings.PARITY
    assert found.rounds == 0


@pytest.mark.parametrize("name", rest_but(["demo"], preset_names(COMMAND.presets)))
def test_every_preset_says_what_it_saves(name: str) -> None:
    config = parse_pretrain([f"--preset={name}"]).config
    torch.manual_seed(0)
    model = build_model(config)
    said = describe_savings(model, 0.01 * torch.rand(2, 12, 96, 96), config.mask.ratio, decode_ratio=1.0)
    assert MEASURED.fullmatch(said), said


@pytest.mark.parametrize(
    "words", [["--data.synthetic_size=64", "--data.synthetic_windows=4"], pytest.param([], marks=pytest.mark.rest)]
)
def test_the_command_of_the_readme_ends_with_what_it_saved(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options have their defaults but those that make the run short."""
    monkeypatch.chdir(tmp_path)
    assert main(["--trainer.max_steps=1", *words]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert MEASURED.fullmatch("\n".join(said[-3:-1])), said[-3:]
    assert said[-1].startswith("Files in runs/demo-")
